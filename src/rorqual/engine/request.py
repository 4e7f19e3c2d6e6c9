"""What an engine is asked and what it answers. The server, RL and `LLM` know the engine only through these.

Any object with the methods of `EngineCore` can stand behind the server: the real engine, or a scripted one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from numbers import Integral
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol

from rorqual.errors import RequestError

if TYPE_CHECKING:
    from torch import Tensor

FinishReason = Literal["stop", "length", "abort", "error"]


class TokenMask(Protocol):
    """Which tokens a grammar allows next. One object serves one completion; the engine drives it."""

    def allowed(self) -> bytes | None:
        """A bit mask of ceil(V/8) bytes, bit i (little endian within a byte) set where token i is allowed;
        None: all."""

    def accept(self, token_id: int) -> None:
        """The sampled token; called once per token, in order."""

    @property
    def finished(self) -> bool:
        """True when only the end may follow; the engine then ends the completion with "stop"."""


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are drawn. Filters act in this order, all in float32: logit_bias and token mask, penalties,
    temperature, top_k, top_p, min_p. `temperature` below 1e-5 is greedy.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: str | Sequence[str] = ()  # a string is one
    stop_token_ids: tuple[int, ...] = ()  # besides the model's own end tokens
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: the sampled token's and the k best alternatives
    prompt_logprobs: int | None = None
    mask: TokenMask | None = None
    return_routed_experts: bool = (
        False  # who computed each token, with the last delta; for models with experts
    )

    @cached_property
    def plain(self) -> bool:
        """Whether nothing changes the logits before they are scaled."""
        return (
            not self.logit_bias
            and self.mask is None
            and self.frequency_penalty == self.presence_penalty == 0
            and self.repetition_penalty == 1
        )

    @cached_property
    def only_temperature(self) -> bool:
        """Whether nothing but a temperature is asked for, and at most the log-probability of what was drawn."""
        return self.plain and not (self.top_k or self.logprobs) and self.top_p == 1 and self.min_p == 0

    def __post_init__(self) -> None:
        def check(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise RequestError(f"{name}={getattr(self, name)!r}: must be {rule}", param=name)

        def whole(value: Any) -> bool:
            return isinstance(value, Integral) and int(value) >= 0

        check(whole(self.max_tokens), "max_tokens", "a whole number, 0 or more")
        check(0 <= self.temperature < float("inf"), "temperature", "0 (greedy) or more")
        check(whole(self.top_k), "top_k", "a whole number, 0 (off) or more")
        check(0 < self.top_p <= 1, "top_p", "above 0, at most 1")
        check(0 <= self.min_p <= 1, "min_p", "0 to 1")
        check(-2 <= self.frequency_penalty <= 2, "frequency_penalty", "-2 to 2")
        check(-2 <= self.presence_penalty <= 2, "presence_penalty", "-2 to 2")
        # Beyond these logits can overflow, and a draw from infinite ones is that of the last token.
        check(0.01 <= self.repetition_penalty <= 100, "repetition_penalty", "0.01 to 100 (1: off)")
        check(
            all(isinstance(t, int) and abs(b) <= 1e6 for t, b in self.logit_bias.items()),
            "logit_bias",
            "token ids with biases of -1e6 to 1e6",
        )
        check(self.seed is None or isinstance(self.seed, int), "seed", "a whole number, or None")
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        check(all(isinstance(s, str) and s for s in self.stop), "stop", "strings that are not empty")
        check(not isinstance(self.stop_token_ids, int), "stop_token_ids", "a tuple of token ids")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            check(value is None or whole(value), name, "a whole number, 0 or more")


@dataclass
class Request:
    """One completion to be made. `cache_salt` keeps the prefix caches of different users apart."""

    request_id: str
    prompt_ids: Sequence[int]
    params: SamplingParams
    priority: int = 0  # lower is sooner
    deadline_s: float | None = None  # seconds from arrival; past it the request ends with "abort"
    cache_salt: str = ""
    model: str | None = None  # an adapter's name; None: the base weights


class TokenLogprob(NamedTuple):
    """A token, its log-probability under the distribution it was drawn from, and the best alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(slots=True)
class Delta:
    """News of one request after a step. `text` is final: held back while a stop string may still complete,
    whole characters only. The last delta of a request has `finish_reason`.
    """

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    logprobs: list[TokenLogprob] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprob | None] | None = None  # with the first delta, where asked
    finish_reason: FinishReason | None = None
    stop_text: str | None = None  # the stop string that ended it
    error: str | None = None  # with finish_reason "error"
    prompt_tokens: int = 0
    cached_tokens: int = 0  # prompt tokens computed by earlier requests
    # with the last delta, where asked: expert ids int16 [prompt + completion - 1, MoE layers, K] of every computed token
    routed_experts: Tensor | None = None

    def extend(self, later: Delta) -> None:
        """Add what came after, in the same step."""
        self.token_ids += later.token_ids
        self.text += later.text
        self.logprobs += later.logprobs
        self.finish_reason, self.stop_text, self.error = later.finish_reason, later.stop_text, later.error
        self.routed_experts = later.routed_experts


@dataclass(frozen=True)
class EngineStats:
    """A moment's view for /metrics and the live pages."""

    running: int = 0
    waiting: int = 0
    blocks_total: int = 0
    blocks_used: int = 0
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prefix_query_tokens: int = 0


class EngineCore(Protocol):
    """A synchronous engine: requests go in, `step` returns deltas. Not thread safe: one thread owns it."""

    max_model_len: int
    vocab_size: int

    def add(self, request: Request) -> None:
        """Queue a request. Raises `RequestError` before any compute where it cannot be served
        (empty prompt, ids outside the vocabulary, prompt longer than the context, queue full)."""

    def abort(self, request_id: str) -> None:
        """Drop a request and free what it holds; unknown ids are ignored. No delta follows."""

    def step(self) -> list[Delta]:
        """Advance every scheduled request by one step."""

    def has_work(self) -> bool:
        """True while a request is running or waiting."""

    def stats(self) -> EngineStats: ...
