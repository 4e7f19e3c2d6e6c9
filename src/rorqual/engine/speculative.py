"""Speculation by n-gram look-up: guess that what followed the last few tokens before will follow them again.

Guesses are checked in one step: the engine draws each position as it always does, and goes on as long as the draw is
the guess. As a draw is a function of the logits, the seed and its position alone, the text is the one that would have
come without speculation, at any temperature.
"""

from __future__ import annotations

from collections.abc import Sequence

LONGEST, SHORTEST = 4, 2  # tokens that must repeat: longer matches are right more often
WINDOW = 4096  # tokens looked back over


def propose(tokens: Sequence[int], count: int) -> list[int]:
    """Up to `count` tokens that followed the most recent earlier occurrence of the longest matching ending."""
    recent = list(tokens[-WINDOW:])
    for size in range(min(LONGEST, len(recent) - 1), SHORTEST - 1, -1):
        ending = recent[-size:]
        for at in range(len(recent) - size - 1, -1, -1):
            if recent[at] == ending[0] and recent[at : at + size] == ending:
                return recent[at + size : at + size + count]
    return []
