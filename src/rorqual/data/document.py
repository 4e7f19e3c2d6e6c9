"""One text on its way from a source to the shards."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

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


def words(text: str) -> list[str]:
    """Words; in Chinese, where none are spaced apart, characters."""
    return WORDS.findall(text.lower())
