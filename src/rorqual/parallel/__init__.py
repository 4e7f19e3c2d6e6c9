"""One training run on many processes: who holds what, and what they tell each other."""
