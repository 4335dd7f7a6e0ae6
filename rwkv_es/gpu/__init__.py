"""The engine for GPUs (Triton)."""
