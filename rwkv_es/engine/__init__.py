"""Tokens in, tokens out: the token loop and what computes it on CPUs and GPUs."""
