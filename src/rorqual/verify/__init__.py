"""Verifiers: answers that a program can check. A leaf, used by reinforcement learning and by evaluation."""
