"""A request on its way: its tokens, how far the cache holds them, its blocks, its answer so far."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from rorqual.engine.blocks import Hash
from rorqual.engine.lookup import Lookup
from rorqual.engine.request import Request, TokenLogprob
from rorqual.engine.stop import StopChecker

if TYPE_CHECKING:
    from rorqual.engine.adapters import Adapter


@dataclass(eq=False)
class Sequence:
    """State of one request. `computed` tokens are in the cache; `tokens` are prompt and completion together."""

    request: Request
    arrival: int
    max_tokens: int
    stop: StopChecker
    seed: int
    hashes: list[Hash]  # [0] is the root; one more for each full block that was named
    adapter: Adapter | None = None  # whose weights compute it; None: the engine's own
    tokens: list[int] = field(default_factory=list)
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    published: int = 0  # leading blocks that are findable
    cached_tokens: int | None = None  # set when it is first admitted
    started: bool = False  # whether a delta was sent
    preemptions: int = 0
    guess: list[int] = field(default_factory=list)  # of the model's own module, for the next step
    draft: list[int] = field(default_factory=list)  # guesses to be checked in this step
    prompt_logprobs: list[TokenLogprob | None] | None = None
    _lookup: Lookup | None = None
    arrived_at: float = field(default_factory=time.monotonic)
    prompt_len: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt_len = len(self.request.prompt_ids)
        if not self.tokens:
            self.tokens = list(self.request.prompt_ids)

    def lookup(self, longest: int) -> Lookup:
        """What is known of its repetitions, for a model that reads them."""
        if self._lookup is None:
            self._lookup = Lookup(longest)
        return self._lookup

    @property
    def id(self) -> str:
        return self.request.request_id

    @property
    def completion(self) -> list[int]:
        return self.tokens[self.prompt_len :]

    @property
    def generated(self) -> int:
        return len(self.tokens) - self.prompt_len

    @property
    def order(self) -> tuple[int, int]:
        """Who comes first: lower priority number, then earlier arrival."""
        return (self.request.priority, self.arrival)

    @property
    def expired(self) -> bool:
        limit = self.request.deadline_s
        return limit is not None and time.monotonic() - self.arrived_at > limit
