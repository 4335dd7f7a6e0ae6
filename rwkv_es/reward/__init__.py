"""Scoring answers in worker processes."""
