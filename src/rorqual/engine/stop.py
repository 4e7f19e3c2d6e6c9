"""Text out of tokens: whole characters only, and nothing that may still become a stop string."""

from __future__ import annotations

from collections.abc import Sequence

from rorqual.text.tokenizer import Tokenizer


class StopChecker:
    """Turns token ids into text that is safe to send. Works without a tokenizer too: the text is then empty."""

    def __init__(self, tokenizer: Tokenizer | None, stops: Sequence[str]) -> None:
        self._detokenizer = None if tokenizer is None else tokenizer.detokenizer()
        self._stops = tuple(stops)
        self._held = ""
        self.matched: str | None = None

    def push(self, token_id: int) -> str:
        """The text that this token makes certain. After a match `matched` is set and what follows it is dropped."""
        if self._detokenizer is None or self.matched is not None:
            return ""
        return self._add(self._detokenizer.push(token_id))

    def flush(self) -> str:
        """What was held back, at the end of the answer."""
        if self._detokenizer is None or self.matched is not None:
            return ""
        text = self._add(self._detokenizer.flush())
        if self.matched is None:
            text, self._held = text + self._held, ""
        return text

    def _add(self, text: str) -> str:
        self._held += text
        if not self._stops:
            text, self._held = self._held, ""
            return text
        hits = [(self._held.find(s), s) for s in self._stops if s in self._held]
        if hits:
            at, self.matched = min(hits, key=lambda hit: (hit[0], -len(hit[1])))
            text, self._held = self._held[:at], ""
            return text
        keep = max(_overlap(self._held, s) for s in self._stops)
        cut = len(self._held) - keep
        text, self._held = self._held[:cut], self._held[cut:]
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` with which `stop` begins."""
    for size in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:size]):
            return size
    return 0
