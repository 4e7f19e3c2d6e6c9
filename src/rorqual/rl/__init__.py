"""Reinforcement learning on answers that a program can check."""
