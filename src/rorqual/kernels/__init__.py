"""Each operation: a plain PyTorch reference that defines it, then faster twins."""
