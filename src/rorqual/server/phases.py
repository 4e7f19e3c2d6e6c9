"""Token masks as a row of phases: free text until a marker, forced text, and grammars in between.

A token that would complete a marker and go on past it is not allowed, so a phase never begins mid-token.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from typing import Protocol

from rorqual.server.vocabulary import Vocabulary


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
