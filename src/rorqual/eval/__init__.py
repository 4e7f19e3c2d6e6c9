"""Bits per byte, task accuracy and pass@k with intervals."""
