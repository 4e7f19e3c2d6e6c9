"""Experiments that start at once and earn their budget."""
