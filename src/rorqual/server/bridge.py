"""One thread owns the engine; the event loop hands it requests and gets back what each step brought.

A client that goes away is forgotten at once: its completions are dropped from the queue or freed after the
step that is running.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import TypeVar

from rorqual.engine.request import Delta, EngineCore, EngineStats, Request
from rorqual.errors import RequestError
from rorqual.server.faults import ApiError, from_request_error, overloaded

T = TypeVar("T")
log = logging.getLogger(__name__)
_BROKEN_AFTER = 3  # steps that raise, one after the other


@dataclass(frozen=True)
class Arrival:
    """Deltas of one step for one ticket, and when they came (event loop clock, seconds)."""

    deltas: list[Delta]
    at: float


class Ticket:
    """The open completions of one request to the API."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = list(requests)
        self.open = {r.request_id for r in requests}
        self._accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._arrivals: deque[Arrival] = deque()
        self._news = asyncio.Event()
        self._error: ApiError | None = None

    async def accepted(self) -> None:
        """Return once the engine has queued everything; raise `ApiError` where it refused."""
        await self._accepted

    async def next(self) -> Arrival:
        """The next deltas, in order. Raises `ApiError` when the engine failed or the server stops."""
        while not self._arrivals:
            if self._error is not None:
                raise self._error
            self._news.clear()
            await self._news.wait()
        return self._arrivals.popleft()

    def _push(self, arrival: Arrival) -> None:
        self._arrivals.append(arrival)
        self._news.set()

    def _answer(self, error: ApiError | None) -> None:
        """The engine's word on whether it takes the requests."""
        if self._accepted.done():
            return
        if error is None:
            self._accepted.set_result(None)
        else:
            self._accepted.set_exception(error)
            self._accepted.exception()  # a client that has gone leaves nobody to read it

    def _fail(self, error: ApiError) -> None:
        self._error = error
        self._answer(error)
        self._news.set()


class Bridge:
    """An engine on its own thread. All methods are for the event loop that called `start`. `compute`: where steps are
    done instead, one thread for several engines. `gather_from`, `gather_s`: see `Settings`."""

    def __init__(
        self,
        engine: EngineCore,
        max_open: int = 1024,
        compute: Executor | None = None,
        gather_from: int = 0,
        gather_s: float = 0.2,
    ) -> None:
        self.engine = engine
        self.max_open = max_open
        self.gather_from, self.gather_s = gather_from, gather_s
        self._sent: dict[str, float] = {}  # when the last tokens of a request left
        self._held: dict[str, Delta] = {}  # tokens that wait for their successors
        self._compute = compute
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Event()
        self._stopping = False
        self._failures = 0
        self._stats = EngineStats()
        self._tickets: dict[str, Ticket] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Begin; deltas go to the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    async def stop(self) -> None:
        """Let the running step end, then end the thread."""
        self._stopping = True
        self._wake.set()
        await asyncio.to_thread(self._thread.join)

    @property
    def healthy(self) -> bool:
        """False once the engine failed several steps in a row."""
        return self._failures < _BROKEN_AFTER and self._thread.is_alive()

    @property
    def open_requests(self) -> int:
        """Completions that are queued or running."""
        return len(self._tickets)

    def stats(self) -> EngineStats:
        """The engine's figures after its last step."""
        return self._stats

    def submit(self, requests: Sequence[Request]) -> Ticket:
        """Queue completions. Raises 503 at once when too many are open."""
        if not self.healthy:
            raise overloaded("the engine has failed; the server must be restarted", retry_after_s=30)
        if len(self._tickets) + len(requests) > self.max_open:
            raise overloaded(f"{len(self._tickets)} completions are open and the limit is {self.max_open}")
        ticket = Ticket(requests)
        for request in requests:
            self._tickets[request.request_id] = ticket
        self._command(lambda: self._add(ticket))
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Drop what is still open of a ticket."""
        gone = [rid for rid in ticket.open if self._tickets.pop(rid, None) is not None]
        ticket.open.clear()
        if gone:
            self._command(lambda: self._abort(gone))

    def fail_all(self, error: ApiError) -> None:
        """End every open completion with `error`."""
        for ticket in set(self._tickets.values()):
            self.cancel(ticket)
            ticket._fail(error)

    def run_on_engine(self, function: Callable[[], object]) -> asyncio.Future[object]:
        """Call `function` between two steps, on the engine's thread."""
        assert self._loop is not None
        future: asyncio.Future[object] = self._loop.create_future()

        def call() -> None:
            try:
                result = self._do(function)
            except Exception as e:
                self._tell(_set_exception, future, e)
            else:
                self._tell(_set_result, future, result)

        self._command(call)
        return future

    # On the engine's thread

    def _run(self) -> None:
        while not self._stopping:
            while self._commands:
                self._commands.popleft()()
            if self.engine.has_work():
                self._step()
                continue
            self._stats = self.engine.stats()
            self._wake.wait()
            self._wake.clear()

    def _do(self, function: Callable[[], T]) -> T:
        return function() if self._compute is None else self._compute.submit(function).result()

    def _step(self) -> None:
        try:
            deltas = self._do(self.engine.step)
            self._failures = 0
        except Exception:
            self._failures += 1
            log.exception("a step of the engine failed")
            self._tell(self._step_failed)
            return
        self._stats = self.engine.stats()
        if self.gather_from:
            deltas = self._gathered(deltas, time.monotonic())
        if deltas:
            self._tell(self._deliver, deltas)

    def _gathered(self, deltas: list[Delta], now: float) -> list[Delta]:
        """What leaves now. A chunk costs its stream's socket 100 us whatever is in it, on cores that compute."""
        held, self._held = self._held, {}
        many, out = len(deltas) >= self.gather_from, []
        for delta in deltas:
            name, first = delta.request_id, held.pop(delta.request_id, None)
            if first is not None:
                first.extend(delta)
            whole = first or delta
            if many and whole.finish_reason is None and now - self._sent.get(name, -math.inf) < self.gather_s:
                self._held[name] = whole
                continue
            out.append(whole)
            self._sent[name] = now
            if whole.finish_reason is not None:
                del self._sent[name]
        return [*held.values(), *out]  # those that were not in this step wait no longer

    def _add(self, ticket: Ticket) -> None:
        added: list[str] = []
        try:
            for request in ticket.requests:
                if request.request_id in ticket.open:
                    self.engine.add(request)
                    added.append(request.request_id)
        except Exception as e:
            self._abort(added)
            if not isinstance(e, RequestError):
                log.exception("the engine could not take a request")
            error = from_request_error(e) if isinstance(e, RequestError) else _engine_fault(None)
            self._tell(self._refused, ticket, error)
            return
        self._tell(ticket._answer, None)

    def _abort(self, request_ids: Sequence[str]) -> None:
        for request_id in request_ids:
            self.engine.abort(request_id)
            self._sent.pop(request_id, None)
            self._held.pop(request_id, None)
        self._stats = self.engine.stats()

    # On the event loop

    def _deliver(self, deltas: list[Delta]) -> None:
        assert self._loop is not None
        now = self._loop.time()
        news: dict[Ticket, list[Delta]] = {}
        for delta in deltas:
            ticket = self._tickets.get(delta.request_id)
            if ticket is None:
                continue
            news.setdefault(ticket, []).append(delta)
            if delta.finish_reason is not None:
                del self._tickets[delta.request_id]
                ticket.open.discard(delta.request_id)
        for ticket, its in news.items():
            ticket._push(Arrival(its, now))

    def _refused(self, ticket: Ticket, error: ApiError) -> None:
        for request_id in ticket.open:
            self._tickets.pop(request_id, None)
        ticket.open.clear()
        ticket._answer(error)

    def _step_failed(self) -> None:
        self.fail_all(_engine_fault(None))

    def _command(self, function: Callable[[], None]) -> None:
        self._commands.append(function)
        self._wake.set()

    def _tell(self, function: Callable[..., object], *args: object) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop has closed: nobody is left to hear it
            self._loop.call_soon_threadsafe(function, *args)


def _engine_fault(detail: str | None) -> ApiError:
    """What a client may know of an engine's failure."""
    message = f"the engine failed: {detail}" if detail else "the engine failed on this request"
    return ApiError(500, message, code="engine_error")


def delta_fault(delta: Delta) -> ApiError:
    """The error of a delta that ended with "error" or "abort"."""
    if delta.finish_reason == "abort":
        return ApiError(503, "the request took longer than the server allows", code="deadline_exceeded")
    return _engine_fault(delta.error)


def _set_result(future: asyncio.Future[object], result: object) -> None:
    if not future.done():
        future.set_result(result)


def _set_exception(future: asyncio.Future[object], error: Exception) -> None:
    if not future.done():
        future.set_exception(error)
