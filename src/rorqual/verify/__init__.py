"""Answers that a program can check; a leaf used by rl and eval."""
