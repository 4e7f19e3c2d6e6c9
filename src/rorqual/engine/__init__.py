"""Requests, blocks, scheduler, runner, sampler: the inference engine."""
