"""The algorithm: fitness, update, strategy."""
