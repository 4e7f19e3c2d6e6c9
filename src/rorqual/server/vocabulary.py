"""The tokens of a model as bytes: what masks and grammars are made of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import llguidance
from llguidance import LLTokenizer

# Bytes after which more must follow: parts of JSON, and of the markup of a further call.
OPENERS = b'{[",:<\n'


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
        mixed = [i for i in whole if any(c in self.tokens[i] for c in OPENERS)]
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
