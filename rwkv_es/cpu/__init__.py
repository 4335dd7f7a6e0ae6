"""The engine for CPUs (numba)."""
