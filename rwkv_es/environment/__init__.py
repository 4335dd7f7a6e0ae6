"""Environments: what replies to a model's answers, in processes that may hang, and the episodes that come of it."""
