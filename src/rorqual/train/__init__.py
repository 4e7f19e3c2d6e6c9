"""The training loop, optimizers, schedules and reports."""
