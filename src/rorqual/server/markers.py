"""Markers in a stream of text: how much to hold back until it is known whether one begins."""

from __future__ import annotations


def partial_end(text: str, marker: str) -> int:
    """Length of the longest end of `text` that begins `marker` without completing it."""
    for size in range(min(len(text), len(marker) - 1), 0, -1):
        if text.endswith(marker[:size]):
            return size
    return 0
