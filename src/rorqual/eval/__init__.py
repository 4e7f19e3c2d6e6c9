"""How good a model is: bits per byte, accuracy on problems that a program checks, HumanEval; comparable across models."""
