"""How answers leave: whole or as server-sent events, with signs of life while waiting and an eye on the
client.

One task computes and writes; another watches for the client's leaving, which cancels the first at once.
Nothing here buffers: a slow reader holds up only its own task.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Literal

import msgspec
from starlette.types import Receive, Send

from rorqual.server.caller import Caller
from rorqual.server.faults import ApiError, internal

log = logging.getLogger(__name__)
encode = msgspec.json.encode
_SSE_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
_JSON_HEADERS = {"content-type": "application/json"}


@dataclass
class Json:
    """A whole answer: any value that msgspec encodes."""

    value: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Raw:
    """A whole answer of another kind than JSON."""

    body: bytes
    content_type: str
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


@dataclass
class Generated:
    """An answer that is generated within `run`: the whole value, or frames of a stream."""

    run: AbstractAsyncContextManager[Any]
    whole: Callable[[], Awaitable[Any]] | None = None
    frames: Callable[[], AsyncIterator[bytes]] | None = None
    error_frame: Callable[[ApiError], bytes] | None = None


Reply = Json | Raw | Generated
Handler = Callable[[Caller, bytes], Awaitable[Reply]]


def data_frame(value: Any) -> bytes:
    """`data: JSON`, a blank line."""
    return b"data: " + encode(value) + b"\n\n"


def event_frame(name: str, value: Any) -> bytes:
    """`event: NAME`, `data: JSON`, a blank line."""
    return b"event: " + name.encode() + b"\ndata: " + encode(value) + b"\n\n"


def openai_error_frame(error: ApiError) -> bytes:
    """The form of a failure within a stream that the official client raises."""
    return data_frame(error.openai())


class Responder:
    """Writes one answer; remembers when it last wrote and since when the client takes nothing."""

    def __init__(self, send: Send, clock: Callable[[], float]) -> None:
        self._send = send
        self._clock = clock
        self.status: int | None = None
        self.accepted: Literal["whole", "stream"] | None = (
            None  # what is being generated, once the engine took it
        )
        self.last_sent = clock()
        self.blocked_since: float | None = None

    async def start(self, status: int, headers: dict[str, str]) -> None:
        """Send the head, once."""
        if self.status is not None:
            return
        self.status = status
        pairs = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
        await self._timed({"type": "http.response.start", "status": status, "headers": pairs})

    async def write(self, body: bytes, *, more: bool) -> None:
        """Send a part of the body."""
        await self._timed({"type": "http.response.body", "body": body, "more_body": more})

    async def _timed(self, message: dict[str, Any]) -> None:
        self.blocked_since = self._clock()
        await self._send(message)
        self.blocked_since, self.last_sent = None, self._clock()


class ClientGone(Exception):
    """The client left before its answer was through."""


async def respond(work: Awaitable[Reply], caller: Caller, dialect: str, receive: Receive, send: Send) -> int:
    """Carry out `work`, send what comes of it and return the status. The request's body must have been read.
    Raises `ClientGone` when the client left, or takes nothing."""
    loop = asyncio.get_running_loop()
    responder = Responder(send, loop.time)
    settings = caller.service.settings
    task = asyncio.ensure_future(_answer(work, caller, dialect, responder))
    watch = asyncio.ensure_future(_client_left(receive))
    try:
        while not task.done():
            await asyncio.wait(
                {task, watch}, timeout=settings.keep_alive_s, return_when=asyncio.FIRST_COMPLETED
            )
            if task.done():
                break
            blocked = responder.blocked_since
            stuck = blocked is not None and loop.time() - blocked > settings.write_timeout_s
            if watch.done() or stuck:
                raise ClientGone
            if blocked is None and loop.time() - responder.last_sent >= settings.keep_alive_s:
                await _sign_of_life(responder, caller)
        await task
        assert responder.status is not None
        return responder.status
    finally:
        watch.cancel()
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError, ApiError, ClientGone):
            await task


async def _client_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _sign_of_life(responder: Responder, caller: Caller) -> None:
    """A comment in a stream; before a whole answer, its head and a blank line, which JSON allows. Nothing before
    the engine has taken the request: until then it may still be refused with a status."""
    if responder.accepted == "stream" and responder.status is not None:
        await responder.write(b": keep-alive\n\n", more=True)
    elif responder.accepted == "whole":
        await responder.start(200, {**_JSON_HEADERS, **caller.headers()})
        await responder.write(b"\n", more=True)


async def _answer(work: Awaitable[Reply], caller: Caller, dialect: str, responder: Responder) -> None:
    try:
        reply = await work
        if isinstance(reply, Json):
            await responder.start(reply.status, {**_JSON_HEADERS, **caller.headers(), **reply.headers})
            await responder.write(encode(reply.value), more=False)
        elif isinstance(reply, Raw):
            headers = {"content-type": reply.content_type, **caller.headers(), **reply.headers}
            await responder.start(reply.status, headers)
            await responder.write(reply.body, more=False)
        else:
            await _generate(reply, caller, responder)
    except Exception as e:
        await _fail(e, caller, dialect, responder)


async def _generate(reply: Generated, caller: Caller, responder: Responder) -> None:
    async with reply.run:
        if reply.whole is not None:
            responder.accepted = "whole"
            value = await reply.whole()
            await responder.start(200, {**_JSON_HEADERS, **caller.headers()})
            await responder.write(encode(value), more=False)
            return
        assert reply.frames is not None
        assert reply.error_frame is not None
        responder.accepted = "stream"
        await responder.start(200, {**_SSE_HEADERS, **caller.headers()})
        try:
            async for frame in reply.frames():
                await responder.write(frame, more=True)
        except Exception as e:
            error = _known(e)
            caller.service.metrics.error(error.code)
            await responder.write(reply.error_frame(error), more=False)
            raise error from None  # so that the run knows that it failed
        await responder.write(b"", more=False)


async def _fail(error: Exception, caller: Caller, dialect: str, responder: Responder) -> None:
    if responder.accepted == "stream" and responder.status is not None:
        return  # the stream has told it
    known = _known(error)
    caller.service.metrics.error(known.code)
    body = known.body(dialect, caller.request_id)
    if responder.status is not None:
        # A blank line went out under status 200: the answer must not look whole, so it is cut after
        # the error.
        await responder.write(body, more=True)
        raise ClientGone
    await responder.start(known.status, {**_JSON_HEADERS, **caller.headers(), **known.headers})
    await responder.write(body, more=False)


def _known(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    log.exception("a request failed", exc_info=error)
    return internal()
