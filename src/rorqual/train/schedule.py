"""The share of the full rate at a step: a pure function, so a resumed run cannot jump (huggingface/nanotron#245)."""

from __future__ import annotations

import math

from rorqual.train.config import Schedule


def rate(schedule: Schedule, step: int, steps: int) -> float:
    """Share of the full rate for the update number `step` (from 0) of `steps`."""
    warmup = math.ceil(schedule.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.name == "cosine":
        done = (step - warmup) / max(steps - warmup, 1)
        return schedule.floor + (1 - schedule.floor) * 0.5 * (1 + math.cos(math.pi * done))
    cooldown = math.ceil(schedule.cooldown * steps)
    left = steps - step
    if left > cooldown:
        return 1.0
    return schedule.floor + (1 - schedule.floor) * left / max(cooldown, 1)
