"""Grammars that keep an answer valid while it is drawn, and bring it to its end before the tokens run out."""

from __future__ import annotations

from collections import deque

from llguidance import LLMatcher

from rorqual.server.faults import invalid
from rorqual.server.json_schema import first_line
from rorqual.server.vocabulary import OPENERS, Vocabulary

_LONGEST_CLOSING = 512  # tokens; a grammar that needs more to end is left to run into max_tokens


class Grammar:
    """A compiled grammar; each completion takes its own matcher from it."""

    def __init__(self, vocabulary: Vocabulary, text: str, param: str) -> None:
        self._vocabulary = vocabulary
        self._matcher = LLMatcher(vocabulary.llg, text, log_level=0)
        if self._matcher.is_error():
            raise invalid(first_line(self._matcher.get_error()), param, "invalid_schema")
        if not any(self._matcher.compute_bitmask()):
            raise invalid("the schema allows no document at all", param, "invalid_schema")

    def phase(self) -> Constrained:
        """A fresh phase at the start of the grammar."""
        return Constrained(self._vocabulary, self._matcher.deep_copy())


class Constrained:
    """A grammar; over when nothing more can follow in it. The end is allowed wherever the grammar may end.

    An answer in JSON that has begun also ends: near the limit a token is allowed only if the shortest end
    still fits after it, and then that end is forced.
    """

    def __init__(self, vocabulary: Vocabulary, matcher: LLMatcher) -> None:
        self._vocabulary = vocabulary
        self._matcher = matcher
        self._text = _JsonText()
        self._closing: deque[int] | None = None
        self._near_end = False
        shortest = self._shortest_end(matcher, self._text)
        self._slack = len(shortest) if shortest is not None else None
        self._estimate = self._slack or 0

    def allowed(self, remaining: int) -> bytes | None:
        if self._matcher.is_error() or self._matcher.is_stopped():
            return self._vocabulary.only(self._vocabulary.eos_ids)
        if self._closing is None:
            self._close_if_due(remaining)
        if self._closing:
            return self._vocabulary.only([self._closing[0]])
        if self._closing is not None and self._matcher.is_accepting():
            return self._vocabulary.only(self._vocabulary.eos_ids)
        mask: bytes = self._matcher.compute_bitmask()[: (self._vocabulary.size + 7) // 8]
        return self._without_detours(mask, remaining) if self._near_end else mask

    def accept(self, token_id: int) -> None:
        if self._closing and self._closing[0] == token_id:
            self._closing.popleft()
        self._matcher.consume_token(token_id)
        self._text.push(self._vocabulary.tokens[token_id])

    @property
    def over(self) -> bool:
        return bool(self._matcher.is_stopped())

    def _close_if_due(self, remaining: int) -> None:
        """Near the end, find the shortest way out; force it when just that many tokens are left. `_slack`,
        the shortest whole document, stands for what one token (an opening bracket) can add to the way out.
        """
        self._near_end = False
        if self._slack is None or remaining > 2 * (self._estimate + self._slack) + 16:
            return
        shortest = self._shortest_end(self._matcher, self._text)
        if shortest is None:
            return
        self._estimate = len(shortest)
        if self._estimate <= remaining <= self._estimate + 1:
            self._closing = deque(shortest)
        self._near_end = self._estimate < remaining <= self._estimate + self._slack + 16

    def _without_detours(self, mask: bytes, remaining: int) -> bytes:
        """`mask` less the tokens after which the end would not fit: only brackets, quotes, commas and colons
        can lead further away; each is tried, and tokens that hold one among others are left out.
        """
        kept = int.from_bytes(mask, "little") & ~self._vocabulary.mixed_structure
        for byte in b'"' if self._text.in_string else OPENERS:
            token_id = self._vocabulary.single(bytes([byte]))
            if (
                token_id is not None
                and kept >> token_id & 1
                and not self._fits_after(token_id, remaining - 1)
            ):
                kept &= ~(1 << token_id)
        return kept.to_bytes(len(mask), "little") if kept else mask

    def _fits_after(self, token_id: int, remaining: int) -> bool:
        matcher, text = self._matcher.deep_copy(), self._text.copy()
        matcher.consume_token(token_id)
        text.push(self._vocabulary.tokens[token_id])
        shortest = self._shortest_end(matcher, text)
        return shortest is not None and len(shortest) <= remaining

    def _shortest_end(self, matcher: LLMatcher, text: _JsonText) -> list[int] | None:
        """A short way to an accepting state, found greedily; None where none was found."""
        matcher, text = matcher.deep_copy(), text.copy()
        path: list[int] = []
        while not (matcher.is_accepting() or matcher.is_stopped()):
            step = matcher.compute_ff_tokens() or self._closing_step(matcher, text)
            if not step or len(path) + len(step) > _LONGEST_CLOSING or not matcher.consume_tokens(step):
                return None
            for token_id in step:
                text.push(self._vocabulary.tokens[token_id])
            path += step
        return path if matcher.is_accepting() and not matcher.is_error() else None

    def _closing_step(self, matcher: LLMatcher, text: _JsonText) -> list[int]:
        mask: bytes = matcher.compute_bitmask()
        for byte in text.closers():
            token_id = self._vocabulary.single(byte)
            if token_id is not None and mask[token_id >> 3] >> (token_id & 7) & 1:
                return [token_id]
        for at, bits in enumerate(mask):
            if bits:
                return [at * 8 + (bits & -bits).bit_length() - 1]
        return []


class _JsonText:
    """Where the JSON so far ends: within a string or a number, or between. What closes it depends on that."""

    _BETWEEN = tuple(bytes([c]) for c in b'}]"0123456789tfn-{[,: ')
    _STRING = tuple(bytes([c]) for c in b'"abcdefghijklmnopqrstuvwxyz0123456789')
    # 0 last: after zeros alone a bound may rule the end out for ever
    _NUMBER = tuple(bytes([c]) for c in b"}],1234567890.eE-+ ")

    def __init__(self) -> None:
        self.in_string = False
        self._in_number = False
        self._escaped = False

    def copy(self) -> _JsonText:
        twin = _JsonText()
        twin.in_string, twin._in_number, twin._escaped = self.in_string, self._in_number, self._escaped
        return twin

    def push(self, piece: bytes) -> None:
        for c in piece:
            if self._escaped:
                self._escaped = False
            elif c == 0x5C and self.in_string:
                self._escaped = True
            elif c == 0x22:
                self.in_string = not self.in_string
            self._in_number = not self.in_string and c in b"0123456789"

    def closers(self) -> tuple[bytes, ...]:
        """Single bytes to try, the one that ends most first."""
        if self.in_string:
            return self._STRING
        return self._NUMBER if self._in_number else self._BETWEEN
