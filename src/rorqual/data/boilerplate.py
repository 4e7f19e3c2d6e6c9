"""Stage: lines that stand in many documents (menus, notices, footers) are cut out of prose.

Counted in a fixed table of hashed lines, so memory does not grow; a rare collision can cost a line, never a document.
"""

from __future__ import annotations

import zlib

import numpy as np
from numpy.typing import NDArray

from rorqual.data.document import Document

SIZE = 1 << 24  # counters, one byte each
SHORTEST = 20  # characters: shorter lines are headings and list items that may well repeat
MANY = 12  # documents


def line_hashes(doc: Document) -> NDArray[np.uint32]:
    """Hashes of a document's distinct long lines; none for code, where equal lines are the language."""
    if doc.kind == "code":
        return np.empty(0, dtype=np.uint32)
    lines = {line.strip() for line in doc.text.splitlines() if len(line.strip()) >= SHORTEST}
    return np.array([zlib.crc32(line.encode()) % SIZE for line in lines], dtype=np.uint32)


class LineCounter:
    """In how many documents a line was seen, up to 255."""

    def __init__(self) -> None:
        self.counts = np.zeros(SIZE, dtype=np.uint8)

    def add(self, hashes: NDArray[np.uint32]) -> None:
        room = self.counts[hashes] < 255
        self.counts[hashes[room]] += 1


def cut_boilerplate(doc: Document, counts: NDArray[np.uint8]) -> int:
    """Cut lines seen in MANY documents out, in place; returns how many."""
    if doc.kind == "code":
        return 0
    lines = doc.text.split("\n")
    kept = [
        line
        for line in lines
        if len(line.strip()) < SHORTEST or counts[zlib.crc32(line.strip().encode()) % SIZE] < MANY
    ]
    doc.text = "\n".join(kept)
    return len(lines) - len(kept)
