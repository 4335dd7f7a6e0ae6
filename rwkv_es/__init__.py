"""Fine-tune RWKV-7 language models on a reward with low-rank evolution strategies."""

__version__ = "0.1.0"
