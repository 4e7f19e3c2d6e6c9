"""Reinforcement learning on checkable answers."""
