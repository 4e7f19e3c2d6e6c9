"""Thought and answer told apart: `<think>` … `</think>` before the answer, the opening often in the prompt
already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rorqual.server.markers import partial_end

OPEN = "<think>"
CLOSE = "</think>"

Section = Literal["reasoning", "content"]


@dataclass(frozen=True)
class Piece:
    """Text of one section. `end`: how many bytes of the raw output lie before its end."""

    section: Section
    text: str
    end: int


def thinks(template: str) -> bool:
    """Whether the chat template is that of a model that thinks."""
    return CLOSE in template


def opened_by(prompt: str, prefix: str | None = None) -> bool:
    """Whether a rendered prompt ends inside a thought, by the template's own tags, or by those of an answer that the
    client has begun (`prefix`)."""
    opened = prompt.rfind(OPEN) > prompt.rfind(CLOSE)
    if prefix is None:
        return opened
    return (opened or prefix.lstrip().startswith(OPEN)) and CLOSE not in prefix


class ReasoningSplitter:
    """Splits raw output into thought and answer, whatever the cuts between the pieces it is fed.

    White space around the tags belongs to neither section. A thought that never closes is all thought.
    """

    def __init__(self, *, opened: bool) -> None:
        self._state = "thought" if opened else "start"  # start, thought, answer
        self._fresh = True  # nothing but white space seen in this section
        self._held = ""
        self._end = 0  # bytes of raw output taken out of `held`
        self.thought_end: int | None = None  # raw bytes up to and including the closing tag

    @property
    def thinking(self) -> bool:
        """Whether the output so far ends inside a thought."""
        return self._state == "thought"

    def feed(self, text: str) -> list[Piece]:
        """The next piece of raw output."""
        self._held += text
        out: list[Piece] = []
        if self._state == "start":
            self._find_open()
        if self._state == "thought":
            self._think(out)
        if self._state == "answer":
            self._answer(out)
        return out

    def finish(self) -> list[Piece]:
        """The output is over: what was held back belongs where it stands."""
        section: Section = "reasoning" if self._state == "thought" else "content"
        text, held = self._held, self._take(len(self._held))
        if section == "reasoning" or (self._fresh and self._state == "answer"):
            text = held.rstrip() if section == "reasoning" else ""
            text = text.lstrip() if self._fresh else text
        return [Piece(section, text, self._end)] if text else []

    def _find_open(self) -> None:
        start = self._held.lstrip()
        if start.startswith(OPEN):
            self._take(len(self._held) - len(start) + len(OPEN))
            self._state = "thought"
        elif not OPEN.startswith(start):
            self._state, self._fresh = "answer", False

    def _think(self, out: list[Piece]) -> None:
        at = self._held.find(CLOSE)
        if at >= 0:
            self._emit("reasoning", self._take(at).rstrip(), out)
            self._take(len(CLOSE))
            self.thought_end = self._end
            self._state, self._fresh = "answer", True
            return
        sure = self._held[: len(self._held) - partial_end(self._held, CLOSE)].rstrip()
        self._emit("reasoning", self._take(len(sure)), out)

    def _answer(self, out: list[Piece]) -> None:
        if self._fresh and not self._held.strip():
            return
        self._emit("content", self._take(len(self._held)), out)

    def _emit(self, section: Section, text: str, out: list[Piece]) -> None:
        if self._fresh:
            text = text.lstrip()
        if text:
            self._fresh = False
            out.append(Piece(section, text, self._end))

    def _take(self, size: int) -> str:
        text, self._held = self._held[:size], self._held[size:]
        self._end += len(text.encode())
        return text
