"""RWKV-7: its files, its tokenizer, its forward pass."""
