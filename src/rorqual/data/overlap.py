"""Stage: nothing of the held-out set or of a given evaluation set stays in the pool.

By 13-grams of words, as in GPT-3's appendix C (arXiv 2005.14165): a document goes that shares one with an evaluation
set, or SHARE of its own with the held-out set (documents of one project share licence lines that prove nothing).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from rorqual.data.document import words

N = 13
SHARE = 0.2


def ngrams(text: str) -> NDArray[np.uint64]:
    """Distinct hashes of a text's 13-grams; of a shorter text, the one of all its words."""
    found = words(text)
    if not found:
        return np.empty(0, dtype=np.uint64)
    base = np.array([zlib.crc32(w.encode()) for w in found], dtype=np.uint64)
    n = min(N, len(base))
    out = np.zeros(len(base) - n + 1, dtype=np.uint64)
    for i in range(n):
        out = out * np.uint64(0x100000001B3) + base[i : len(base) - n + 1 + i]
    return np.unique(out)


class NgramSet:
    """A sorted set of 13-grams of a few reference texts."""

    def __init__(self, texts: Iterable[str]) -> None:
        found = [ngrams(t) for t in texts]
        self._grams = np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.uint64)

    def __len__(self) -> int:
        return len(self._grams)

    def share(self, text: str) -> float:
        """Which part of the text's 13-grams is in the set."""
        own = ngrams(text)
        if not len(own) or not len(self._grams):
            return 0.0
        at = np.searchsorted(self._grams, own).clip(max=len(self._grams) - 1)
        return float((self._grams[at] == own).mean())
