"""What every request passes before its route: its id, its key, its host; all pure ASGI, so leaving is still
seen.

Default deny: with keys made, every path needs one, known or not, but /health. Without keys the door is open,
and then only to this machine's own names, so that a web page cannot reach it by rebinding a name.
"""

from __future__ import annotations

import base64
import binascii
import logging
import secrets
import time
from contextvars import ContextVar

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rorqual.server.faults import ApiError
from rorqual.server.service import Service

access = logging.getLogger("rorqual.access")
REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="-")
_OPEN_PATHS = ("/health",)
_LOCAL_HOSTS = ("localhost", "127.0.0.1", "[::1]", "")
_MAX_ID = 128


class RequestIds:
    """Echoes or makes x-request-id, and writes one line of the access log for each answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request_id = _request_id(Headers(scope=scope))
        scope["rorqual.request_id"] = request_id
        token = REQUEST_ID.set(request_id)
        began = time.perf_counter()
        status = 0

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        finally:
            took = (time.perf_counter() - began) * 1e3
            key_id = scope.get("rorqual.key_id", "-")
            access.info(
                "request_id=%s key=%s %s %s status=%d ms=%.1f",
                request_id,
                key_id,
                scope["method"],
                scope["path"],
                status,
                took,
            )
            REQUEST_ID.reset(token)


class Door:
    """Lets in who has a key; leaves the key in the scope."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in _OPEN_PATHS:
            try:
                self._check(scope)
            except ApiError as error:
                await refuse(error, scope, send, self._service)
                return
        await self._app(scope, receive, send)

    def _check(self, scope: Scope) -> None:
        headers = Headers(scope=scope)
        if self._service.open_door and not self._service.ledger.has_keys():
            host = headers.get("host", "").lower()
            if _without_port(host) not in _LOCAL_HOSTS:
                message = f"the host {host[:100]!r} is not this machine; `rorqual keys make` lets others in"
                raise ApiError(403, message, code="host_not_allowed")
            return
        text = _key_text(headers)
        key = self._service.ledger.find_key(text)
        if key is None:
            said = "no API key was sent" if not text else "the API key is not valid"
            scheme = "Basic" if scope["path"] == "/" else "Bearer"
            headers_out = {"www-authenticate": f'{scheme} realm="rorqual"'}
            message = f"{said}; send Authorization: Bearer KEY or x-api-key: KEY"
            raise ApiError(401, message, code="invalid_api_key", headers=headers_out)
        scope["rorqual.key"] = key
        scope["rorqual.key_id"] = key.id


async def refuse(error: ApiError, scope: Scope, send: Send, service: Service) -> None:
    """Answer with an error, in the dialect of the path."""
    service.metrics.error(error.code)
    service.metrics.answered("refused", error.status)
    body = error.body(dialect_of(scope["path"]), scope.get("rorqual.request_id", ""))
    headers = {"content-type": "application/json", "content-length": str(len(body)), **error.headers}
    pairs = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})


def dialect_of(path: str) -> str:
    """In which shape clients of a path read errors."""
    return "anthropic" if path.endswith(("/messages", "/messages/count_tokens")) else "openai"


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    if 0 < len(given) <= _MAX_ID and given.isascii() and given.isprintable():
        return given
    return f"req_{secrets.token_hex(12)}"


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdigit() else host


def _key_text(headers: Headers) -> str:
    """A key from Bearer, x-api-key, or the password of Basic, which is how a browser sends one."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return value.strip()
    if scheme.lower() == "basic":
        try:
            return base64.b64decode(value, validate=True).decode().partition(":")[2]
        except (binascii.Error, UnicodeDecodeError):
            return ""
    return headers.get("x-api-key", "").strip()
