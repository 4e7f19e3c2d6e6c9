"""One text on its way from a source to the shards."""

from __future__ import annotations

import re
import zlib
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Kind = Literal["code", "chinese", "prose"]

# fmt: off
CODE_SUFFIXES = frozenset({
    ".py", ".pyi", ".js", ".ts", ".tsx", ".jsx", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go",
    ".java", ".kt", ".rb", ".php", ".pl", ".lua", ".sh", ".sql", ".r", ".jl", ".scala", ".swift", ".cs",
    ".hs", ".ml", ".tex", ".css", ".toml", ".yaml", ".yml", ".cmake",
})
# fmt: on
HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]")
WORDS = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff]|\w+")


@dataclass
class Document:
    """A text, where it came from, and what kind of rules judge it."""

    text: str
    origin: str
    kind: Kind


def kind_of(text: str, suffix: str) -> Kind:
    """By the file's name where that says it is code, else by its letters: a fifth of them Han makes it Chinese."""
    if suffix in CODE_SUFFIXES:
        return "code"
    sample = text[:20_000]
    letters = sum(c.isalpha() for c in sample)
    return "chinese" if letters and len(HAN.findall(sample)) / letters > 0.2 else "prose"


def hashes(found: list[str]) -> NDArray[np.uint64]:
    """A hash of each word, the same in every process."""
    return np.array([zlib.crc32(w.encode()) for w in found], dtype=np.uint64)


def ngrams(base: NDArray[np.uint64], n: int) -> NDArray[np.uint64]:
    """A hash of each run of `n` of the hashed words, in order; of fewer words, one of them all."""
    n = min(n, len(base))
    if n == 0:
        return base
    out = np.zeros(len(base) - n + 1, dtype=np.uint64)
    for i in range(n):
        out = out * np.uint64(0x100000001B3) + base[i : len(base) - n + 1 + i]
    return out ^ (out >> np.uint64(31))


def words(text: str) -> list[str]:
    """Words; in Chinese, where none are spaced apart, characters."""
    return WORDS.findall(text.lower())
