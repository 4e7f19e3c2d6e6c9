"""A request to generate, free of any client's dialect, and its run: admission, events, and the charge at the
end.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from types import TracebackType

from rorqual.engine.request import Request, SamplingParams, TokenLogprob, TokenMask
from rorqual.errors import RequestError
from rorqual.server.answer import Answer, Reading
from rorqual.server.bridge import Arrival, Ticket, delta_fault
from rorqual.server.caller import Caller
from rorqual.server.events import Event, Finish
from rorqual.server.faults import ApiError, from_request_error, invalid
from rorqual.server.ledger import Charge
from rorqual.server.models import Served
from rorqual.server.usage import Usage

log = logging.getLogger(__name__)
_LEDGER_WAIT_S = 60.0


@dataclass(frozen=True)
class Turn:
    """What to generate: `n` completions for each prompt. Choice i belongs to prompt i // n."""

    model: Served
    prompts: list[list[int]]
    params: SamplingParams
    n: int = 1
    reading: Reading = field(default_factory=Reading)
    mask: Callable[[int], TokenMask] | None = None  # a fresh mask, for so many tokens at most
    cache_salt: str = ""

    def requests(self, request_id: str, deadline_s: float | None) -> list[Request]:
        """One for each choice; with a seed, choice i draws with seed + i."""
        out = []
        for choice in range(len(self.prompts) * self.n):
            prompt = self.prompts[choice // self.n]
            params = self._params_of(choice % self.n, len(prompt))
            out.append(
                Request(
                    f"{request_id}-{choice}",
                    prompt,
                    params,
                    deadline_s=deadline_s,
                    cache_salt=self.cache_salt,
                    model=self.model.adapter,
                )
            )
        return out

    def _params_of(self, repeat: int, prompt_tokens: int) -> SamplingParams:
        room = self.model.max_model_len - prompt_tokens
        max_tokens = min(self.params.max_tokens, room)
        seed = None if self.params.seed is None else self.params.seed + repeat
        mask = self.mask(max_tokens) if self.mask is not None else None
        return replace(self.params, max_tokens=max_tokens, seed=seed, mask=mask)


def check_room(model: Served, prompt: list[int], max_tokens: int, param: str) -> None:
    """400 where a prompt leaves no room for what is asked; before any compute."""
    limit = model.max_model_len
    if not prompt:
        raise invalid(f"{param}: the prompt has no tokens", param)
    if len(prompt) > limit or (len(prompt) == limit and max_tokens > 0):
        message = (
            f"the prompt has {len(prompt)} tokens and this model's context is {limit} tokens, prompt and"
            " completion together; shorten the prompt"
        )
        raise invalid(message, param, "context_length_exceeded")


class Run:
    """A turn under way. Enter it (admission; errors come before any header), read its events, and leave it:
    what is still open then is cancelled and paid as far as it came.
    """

    def __init__(self, turn: Turn, caller: Caller) -> None:
        self.turn = turn
        self.caller = caller
        self.usage = Usage(currency=caller.service.prices.currency)
        self.prompt_logprobs: dict[int, list[TokenLogprob | None]] = {}
        model = turn.model
        count = len(turn.prompts) * turn.n
        self.answers = [
            Answer(turn.reading, model.tokenizer.token_bytes, model.tokenizer.eos_ids) for _ in range(count)
        ]
        self._cached: dict[int, int] = {}
        self._ticket: Ticket | None = None
        self._settled = False
        self._last_at: dict[int, float] = {}
        self._reasons: set[str] = set()

    async def __aenter__(self) -> Run:
        service, caller = self.caller.service, self.caller
        prompt_tokens = sum(map(len, self.turn.prompts))
        caller.admit(prompt_tokens)
        try:
            requests = self.turn.requests(caller.id, service.settings.request_timeout_s)
        except RequestError as e:
            raise from_request_error(e) from None
        self._ticket = self.turn.model.bridge.submit(requests)
        try:
            await self._ticket.accepted()
        except BaseException:
            self.turn.model.bridge.cancel(self._ticket)
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._ticket is not None:
            self.turn.model.bridge.cancel(self._ticket)
        outcome = error.code if isinstance(error, ApiError) else "abort"
        ours = isinstance(error, ApiError) and error.status == 500  # the engine's failure costs nothing
        if not self._settled and self._cached and not ours:
            await self._settle(outcome)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(choice, event) in order. The charge is written before the last `Finish` is given out."""
        assert self._ticket is not None
        while not self._settled:
            arrival = await self._ticket.next()
            events = self._read(arrival)
            if all(answer.finished for answer in self.answers):
                await self._settle("length" if "length" in self._reasons else "stop")
            for event in events:
                yield event

    def _read(self, arrival: Arrival) -> list[tuple[int, Event]]:
        out: list[tuple[int, Event]] = []
        for delta in arrival.deltas:
            choice = int(delta.request_id.rsplit("-", 1)[1])
            if delta.finish_reason in ("error", "abort"):
                raise delta_fault(delta)
            self._cached[choice] = delta.cached_tokens
            if delta.prompt_logprobs is not None:
                self.prompt_logprobs[choice] = delta.prompt_logprobs
            self._time(choice, len(delta.token_ids), arrival.at)
            events = self.answers[choice].push(delta)
            self._reasons |= {e.reason for e in events if isinstance(e, Finish)}
            out += [(choice, event) for event in events]
        return out

    def _time(self, choice: int, tokens: int, at: float) -> None:
        if not tokens:
            return
        metrics, name = self.caller.service.metrics, self.turn.model.name
        if choice not in self._last_at:
            metrics.first_token(name, at - self.caller.arrived, self.caller.request_id)
        else:
            metrics.next_tokens(name, at - self._last_at[choice], tokens)
        self._last_at[choice] = at

    async def _settle(self, outcome: str) -> None:
        self.usage = self.used()
        caller, service = self.caller, self.caller.service
        key_id = caller.key.id if caller.key is not None else None
        name = self.turn.model.name
        await self._book(Charge(caller.id, key_id, name, caller.route, self.usage, outcome))
        caller.spend(self.usage.prompt + self.usage.completion)
        seconds = asyncio.get_running_loop().time() - caller.arrived
        service.metrics.finished(name, self.usage, outcome, seconds, caller.request_id)

    async def _book(self, charge: Charge) -> None:
        """Write a charge, once. Another process may hold the file for a while, which keeps only this answer waiting."""
        clock = asyncio.get_running_loop().time
        give_up = clock() + _LEDGER_WAIT_S
        while not self.caller.service.ledger.try_charge(charge):
            if clock() > give_up:
                self._settled = True
                log.error("the ledger was locked for %g s; not written: %r", _LEDGER_WAIT_S, charge)
                raise ApiError(503, "the ledger is locked by another process", code="ledger_locked")
            await asyncio.sleep(0.02)
        self._settled = True

    def used(self) -> Usage:
        """What was used so far. Each prompt counts once, whatever n; of the n, what the first found in the
        cache.
        """
        turn = self.turn
        begun = [p for p in range(len(turn.prompts)) if p * turn.n in self._cached]
        prompt = sum(len(turn.prompts[p]) for p in begun)
        cached = sum(self._cached[p * turn.n] for p in begun)
        completion = sum(a.completion_tokens for a in self.answers)
        rates = self.caller.service.prices.rates(turn.model.name, self.caller.moment, turn.model.base)
        return Usage(
            prompt=prompt,
            cached=cached,
            completion=completion,
            reasoning=sum(a.reasoning_tokens for a in self.answers),
            cost=rates.cost(cached, prompt - cached, completion),
            currency=self.caller.service.prices.currency,
            flops=turn.model.flops(cached, prompt, completion) if turn.model.flops is not None else None,
        )
