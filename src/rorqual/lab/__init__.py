"""The lab: anyone starts an idea at once at the smallest rung, and the promising ones are given more."""
