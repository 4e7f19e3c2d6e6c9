"""Markers within what a client wrote are text, not markers: nobody ends a turn or begins one by writing `<|im_end|>`.

A template writes markers and messages into one text, in which they can no longer be told apart. So each special
token's text within a message is covered by a mark before it is rendered, and read letter by letter afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Protocol


class Encoder(Protocol):
    """What reading needs of a tokenizer."""

    def encode(self, text: str, add_bos: bool | None = ..., special: bool = ...) -> list[int]: ...


_MARK = re.compile("\ue000(\\d+)\ue001")


class Shield:
    """Covers the texts of special tokens for one rendering."""

    def __init__(self, specials: Sequence[str]) -> None:
        self._specials = [s for s in specials if s]
        longest_first = sorted(self._specials, key=len, reverse=True)
        # Marks that a client writes itself are covered too, so that they come back as they were.
        parts = [re.escape(s) for s in longest_first]
        self._find = re.compile("|".join([_MARK.pattern, *parts]))
        self._covered: list[str] = []

    def cover(self, value: Any) -> Any:
        """A message or tool with its texts covered; roles are ours and stay."""
        if isinstance(value, str):
            return self._find.sub(self._hide, value)
        if isinstance(value, dict):
            return {k: v if k == "role" else self.cover(v) for k, v in value.items()}
        if isinstance(value, list):
            return [self.cover(v) for v in value]
        return value

    def uncover(self, text: str) -> str:
        """A rendered text as the client meant it."""
        return _MARK.sub(lambda m: self._text(m), text)

    def encode(self, text: str, tokenizer: Encoder) -> list[int]:
        """Ids of a rendered text: the template's markers as tokens, covered ones as letters."""
        if not self._covered:
            return tokenizer.encode(text, add_bos=False)
        ids: list[int] = []
        at = 0
        for mark in _MARK.finditer(text):
            ids += tokenizer.encode(text[at : mark.start()], add_bos=False)
            ids += tokenizer.encode(self._text(mark), add_bos=False, special=False)
            at = mark.end()
        return ids + tokenizer.encode(text[at:], add_bos=False)

    def _hide(self, found: re.Match[str]) -> str:
        self._covered.append(found.group())
        return f"\ue000{len(self._covered) - 1}\ue001"

    def _text(self, mark: re.Match[str]) -> str:
        return self._covered[int(mark.group(1))]
