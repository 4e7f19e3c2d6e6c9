"""Token masks that make an answer valid while it is drawn: JSON, JSON Schema, tool calls, and the end of a
thought.

A mask is a row of phases. Free text runs until a marker (the closing think tag, the opening of a tool call),
a grammar (llguidance) then takes over where structure must follow. Two rules keep a strict answer whole: - a
token that would complete a marker and go on past it is not allowed, so a phase never begins mid-token; - when
the tokens left are just enough, the shortest way to the end of the grammar is forced.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import llguidance
from llguidance import LLMatcher, LLTokenizer

from rorqual.server.faults import invalid

_OPENERS = (
    b'{[",:<\n'  # bytes after which more must follow: parts of JSON, and of the markup of a further call
)
_LONGEST_CLOSING = 512  # tokens; a grammar that needs more to end is left to run into max_tokens


if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions


class VocabularySource(Protocol):
    """What masks need to know of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def eos_ids(self) -> Sequence[int]: ...
    def token_bytes(self, token_id: int) -> bytes: ...
    def encode(self, text: str, add_bos: bool | None = ..., special: bool = ...) -> list[int]: ...


class Vocabulary:
    """The tokens of a model as bytes, in the form that llguidance wants. Built once a model (0.7 s at 100k
    tokens).
    """

    def __init__(self, source: VocabularySource, size: int, special_ids: Sequence[int]) -> None:
        self.size = size
        self.eos_ids = tuple(source.eos_ids)
        self._source = source
        known = min(size, source.vocab_size)
        special = set(special_ids) | set(self.eos_ids) | set(range(known, size))
        self.tokens = [
            f"<special {i}>".encode() if i in special else source.token_bytes(i) for i in range(size)
        ]
        empty = {i for i, token in enumerate(self.tokens) if not token}
        self._special_ids = sorted(special | empty)
        self._first_byte: dict[bytes, int] = {}
        for i, token in enumerate(self.tokens):
            if len(token) == 1:
                self._first_byte.setdefault(token, i)
        self.all_but_eos = self.mask_without(bytes([255]) * ((size + 7) // 8), self.eos_ids)
        self.llg = LLTokenizer(
            llguidance.TokenizerWrapper(_Wrapped(self.tokens, self.eos_ids, self._special_ids, source)),
            n_vocab=size,
            eos_token=list(self.eos_ids),
        )
        whole = (i for i, t in enumerate(self.tokens) if len(t) > 1 and i not in special)
        mixed = [i for i in whole if any(c in self.tokens[i] for c in _OPENERS)]
        self.mixed_structure = int.from_bytes(self.only(mixed), "little")  # a mask, as a number
        self._overruns: dict[bytes, list[tuple[int, bytes]]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids of `text` without a begin token."""
        return self._source.encode(text, add_bos=False)

    def single(self, byte: bytes) -> int | None:
        """The token that is just this byte."""
        return self._first_byte.get(byte)

    def only(self, ids: Sequence[int]) -> bytes:
        """A mask that allows just `ids`."""
        mask = bytearray((self.size + 7) // 8)
        for i in ids:
            mask[i >> 3] |= 1 << (i & 7)
        return bytes(mask)

    @staticmethod
    def mask_without(mask: bytes, ids: Sequence[int]) -> bytes:
        """`mask` less `ids`."""
        out = bytearray(mask)
        for i in ids:
            out[i >> 3] &= ~(1 << (i & 7)) & 255
        return bytes(out)

    def overruns(self, marker: bytes) -> list[tuple[int, bytes]]:
        """Tokens that hold an end of `marker` and more after it, each with the part up to that end."""
        if marker not in self._overruns:
            self._overruns[marker] = list(self._find_overruns(marker))
        return self._overruns[marker]

    def _find_overruns(self, marker: bytes) -> Iterator[tuple[int, bytes]]:
        ends = [marker[i:] for i in range(len(marker))]
        for i, token in enumerate(self.tokens):
            if marker[-1:] not in token[:-1]:
                continue
            for cut in range(1, len(token)):
                head = token[:cut]
                if head.endswith(marker) or head in ends:
                    yield i, head


class _Wrapped:
    """The attributes that llguidance reads off a tokenizer."""

    def __init__(
        self, tokens: list[bytes], eos_ids: Sequence[int], special: list[int], source: VocabularySource
    ) -> None:
        self.tokens = tokens
        self.eos_token_id = eos_ids[0]
        self.bos_token_id = None
        self.special_token_ids = special
        self._source = source

    def __call__(self, text: str | bytes) -> list[int]:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return self._source.encode(text, add_bos=False)


class Phase(Protocol):
    """A stretch of the output under one rule."""

    def allowed(self, remaining: int) -> bytes | None:
        """The mask for the next token when `remaining` may still be drawn; None allows all."""

    def accept(self, token_id: int) -> None: ...

    @property
    def over(self) -> bool:
        """Nothing more belongs to this phase."""


class Free:
    """Anything, to the end."""

    over = False

    def allowed(self, remaining: int) -> bytes | None:
        return None

    def accept(self, token_id: int) -> None:
        pass


class Forced:
    """Exactly these tokens."""

    def __init__(self, vocabulary: Vocabulary, text: str) -> None:
        self._vocabulary = vocabulary
        self._left = deque(vocabulary.encode(text))

    def allowed(self, remaining: int) -> bytes | None:
        return self._vocabulary.only([self._left[0]])

    def accept(self, token_id: int) -> None:
        self._left.popleft()

    @property
    def over(self) -> bool:
        return not self._left


class Until:
    """Free text up to and including `marker`. After `budget` tokens the marker itself is forced.

    With `must` the end of the answer is not allowed before the marker.
    """

    def __init__(
        self, vocabulary: Vocabulary, marker: str, *, budget: int | None = None, must: bool = False
    ) -> None:
        self._vocabulary = vocabulary
        self._marker = marker.encode()
        self._budget = budget
        self._must = must
        self._tail = b""
        self._forced: Forced | None = None
        self.over = False

    def allowed(self, remaining: int) -> bytes | None:
        if self._forced is None and self._budget is not None and self._budget <= 0:
            self._forced = Forced(self._vocabulary, "\n" + self._marker.decode())
        if self._forced is not None:
            return self._forced.allowed(remaining)
        banned = [
            i
            for i, head in self._vocabulary.overruns(self._marker)
            if (self._tail + head).endswith(self._marker)
        ]
        if not banned:
            return self._vocabulary.all_but_eos if self._must else None
        every = (
            self._vocabulary.all_but_eos if self._must else bytes([255]) * len(self._vocabulary.all_but_eos)
        )
        return self._vocabulary.mask_without(every, banned)

    def accept(self, token_id: int) -> None:
        if self._forced is not None:
            self._forced.accept(token_id)
            self.over = self._forced.over
            return
        if self._budget is not None:
            self._budget -= 1
        seen = self._tail + self._vocabulary.tokens[token_id]
        self.over = self._marker in seen
        self._tail = seen[-(len(self._marker) - 1) :]


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
        for byte in b'"' if self._text.in_string else _OPENERS:
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
    _NUMBER = tuple(bytes([c]) for c in b"}],0123456789.eE-+ ")

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


class PhasedMask:
    """The `TokenMask` of one completion: its phases in order, from `loop_to` again when they are through.

    Without a loop, the answer is finished when the last phase is over.
    """

    def __init__(self, phases: Sequence[Phase] | Iterator[Phase], max_tokens: int) -> None:
        self._phases = iter(phases)
        self._phase: Phase | None = next(self._phases)
        self._remaining = max_tokens

    def allowed(self) -> bytes | None:
        """See `TokenMask`."""
        return self._phase.allowed(self._remaining) if self._phase is not None else None

    def accept(self, token_id: int) -> None:
        """See `TokenMask`."""
        self._remaining -= 1
        if self._phase is None:
            return
        self._phase.accept(token_id)
        if self._phase.over:
            self._phase = next(self._phases, None)

    @property
    def finished(self) -> bool:
        """See `TokenMask`."""
        return self._phase is None


class Grammar:
    """A compiled grammar; each completion takes its own matcher from it."""

    def __init__(self, vocabulary: Vocabulary, text: str, param: str) -> None:
        self._vocabulary = vocabulary
        self._matcher = LLMatcher(vocabulary.llg, text, log_level=0)
        if self._matcher.is_error():
            raise invalid(_first_line(self._matcher.get_error()), param, "invalid_schema")
        if not any(self._matcher.compute_bitmask()):
            raise invalid("the schema allows no document at all", param, "invalid_schema")

    def phase(self) -> Constrained:
        """A fresh phase at the start of the grammar."""
        return Constrained(self._vocabulary, self._matcher.deep_copy())


def json_schema_text(schema: dict[str, Any], param: str) -> str:
    """The grammar of a JSON Schema; a 400 that names the keyword and its place where it cannot be kept."""
    text = _schema_grammar(schema)
    error = _fault(text)
    if error:
        where, cause = _blame(schema, "", schema, error)
        place = f"{param}{where}" if where else param
        raise invalid(f"{place}: {cause}", param.split(".", 1)[0].split("[", 1)[0], "invalid_schema")
    return text


def inline_schema(schema: dict[str, Any]) -> str:
    """A schema as a `%json` term of a Lark grammar."""
    return "%json " + json.dumps({**schema, "x-guidance": _OPTIONS})


def supported(schema: dict[str, Any]) -> bool:
    """Whether the grammar can keep all of `schema`."""
    try:
        return not _fault(_schema_grammar(schema))
    except (ValueError, RecursionError):
        return False


# At most one blank after a comma or a colon, none elsewhere: no room for an endless run of white space.
_OPTIONS: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


def _schema_grammar(schema: dict[str, Any]) -> str:
    text: str = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_OPTIONS)
    return text


def _fault(grammar: str) -> str:
    message: str = LLMatcher.validate_grammar(grammar)
    return "" if message.startswith("WARNING") else message


def _first_line(message: str) -> str:
    return " ".join(message.split("<state>")[0].split())[:500]


_NESTED = ("properties", "patternProperties", "$defs", "definitions")
_LISTED = ("anyOf", "allOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties")


def _blame(schema: Any, where: str, root: dict[str, Any], error: str) -> tuple[str, str]:
    """The deepest part of a schema that fails on its own, and why."""
    for place, part in _parts(schema):
        shared: dict[str, Any] = {k: root[k] for k in ("$defs", "definitions") if k in root}
        cause = _fault(_schema_grammar({**shared, **part})) if part is not root else ""
        if cause and "does not exist" not in cause:
            return _blame(part, where + place, root, cause)
    return where, _first_line(error)


def _parts(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(schema, dict):
        return
    for key in _NESTED:
        for name, part in _items(schema.get(key)):
            yield f".{key}.{name}", part
    for key in _LISTED:
        for i, part in enumerate(schema[key] if isinstance(schema.get(key), list) else []):
            if isinstance(part, dict):
                yield f".{key}[{i}]", part
    for key in _SINGLE:
        if isinstance(schema.get(key), dict):
            yield f".{key}", schema[key]


def _items(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield from ((name, part) for name, part in value.items() if isinstance(part, dict))
