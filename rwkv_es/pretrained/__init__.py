"""What a trained model comes as: its checkpoint and its tokenizer."""
