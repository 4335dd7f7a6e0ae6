"""Perturbations: pure functions of counters that know no model and no file."""
