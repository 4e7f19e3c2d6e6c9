"""Stage: nothing of the held-out set or of a given evaluation set stays in the pool.

By 13-grams of words, as in GPT-3's appendix C (arXiv 2005.14165): a document goes that shares one with an evaluation
set, or SHARE of its own with the held-out set (documents of one project share licence lines that prove nothing).
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rorqual.data.document import hashes, ngrams, words

N = 13
SHARE = 0.2


class NgramSet:
    """A sorted set of 13-grams of reference texts. Saved to a file, it is shared by all processes that open it."""

    def __init__(self, grams: NDArray[np.uint64]) -> None:
        self._grams = grams

    @classmethod
    def of(cls, texts: Iterable[str]) -> NgramSet:
        """The set of these texts."""
        found = [_grams(t) for t in texts]
        return cls(np.unique(np.concatenate(found)) if found else np.empty(0, dtype=np.uint64))

    def save(self, path: Path) -> None:
        """Write it for `open`."""
        self._grams.tofile(path)

    @classmethod
    def open(cls, path: Path) -> NgramSet:
        """A saved set, mapped from its file."""
        empty = not path.stat().st_size  # which cannot be mapped
        return cls(np.empty(0, dtype=np.uint64) if empty else np.memmap(path, dtype=np.uint64, mode="r"))

    def __len__(self) -> int:
        return len(self._grams)

    def share(self, text: str) -> float:
        """Which part of the text's 13-grams is in the set."""
        own = _grams(text)
        if not len(own) or not len(self._grams):
            return 0.0
        at = np.searchsorted(self._grams, own).clip(max=len(self._grams) - 1)
        return float((self._grams[at] == own).mean())


def _grams(text: str) -> NDArray[np.uint64]:
    """Distinct hashes of a text's 13-grams."""
    return np.unique(ngrams(hashes(words(text)), N))
