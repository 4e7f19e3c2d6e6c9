"""The routes, with and without /v1 and under /beta, as an ASGI application."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus

from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from rorqual.server import account, catalogue, tokens
from rorqual.server.caller import Caller
from rorqual.server.chat import chat
from rorqual.server.completions import completions
from rorqual.server.decisions import decisions
from rorqual.server.faults import ApiError
from rorqual.server.guard import Door, RequestIds, dialect_of, refuse
from rorqual.server.messages import count_tokens, messages
from rorqual.server.metrics import CONTENT_TYPE
from rorqual.server.openapi import openapi
from rorqual.server.page import page
from rorqual.server.reply import ClientGone, Handler, Json, Raw, Reply, respond
from rorqual.server.responses import responses
from rorqual.server.service import Service

_OPENAI_PREFIXES = ("/v1", "", "/beta", "/beta/v1")
_ANTHROPIC_PREFIXES = ("/v1", "", "/anthropic", "/anthropic/v1")
# POST routes that generate: refused while the server drains.
_GENERATING: tuple[tuple[str, Handler], ...] = (
    ("/chat/completions", chat),
    ("/completions", completions),
    ("/responses", responses),
    ("/decisions", decisions),
)
_POSTS: tuple[tuple[str, Handler], ...] = (
    ("/tokenize", tokens.tokenize),
    ("/detokenize", tokens.detokenize),
    ("/models/load", catalogue.load_model),
    ("/models/unload", catalogue.unload_model),
    ("/load_lora_adapter", catalogue.load_adapter),
    ("/unload_lora_adapter", catalogue.unload_adapter),
)


def build_app(service: Service) -> Starlette:
    """The application of a service; its life span starts and stops the engines."""

    @asynccontextmanager
    async def life(app: Starlette) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()

    async def no_route(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return _no_route(request, error, service)

    cors = Middleware(
        CORSMiddleware,
        allow_origins=service.settings.allow_origins,
        allow_methods=["GET", "POST"],
        allow_headers=["*"],  # clients' libraries send a dozen of their own
        expose_headers=["x-request-id", "retry-after"],
    )
    middleware = [Middleware(RequestIds), cors, Middleware(Door, service=service)]
    if not service.settings.allow_origins:
        middleware.remove(cors)
    return Starlette(
        routes=_routes(service),
        middleware=middleware,
        exception_handlers={HTTPException: no_route},
        lifespan=life,
    )


def _routes(service: Service) -> list[Route]:
    out: list[Route] = []

    def get(path: str, handler: Callable[[Caller], Awaitable[Reply]]) -> None:
        out.append(Route(path, _Get(service, path, handler), methods=["GET"]))

    def post(prefixes: tuple[str, ...], path: str, handler: Handler, *, generates: bool) -> None:
        for prefix in prefixes:
            endpoint = _Post(service, path, handler, generates=generates)
            out.append(Route(prefix + path, endpoint, methods=["POST"]))

    get("/", _page)
    get("/health", _health)
    get("/ready", _ready)
    get("/metrics", _metrics)
    get("/openapi.json", _openapi)
    for path, handler in _GENERATING:
        post(_OPENAI_PREFIXES, path, handler, generates=True)
    for path, handler in _POSTS:
        post(_OPENAI_PREFIXES, path, handler, generates=False)
    post(_ANTHROPIC_PREFIXES, "/messages", messages, generates=True)
    post(_ANTHROPIC_PREFIXES, "/messages/count_tokens", count_tokens, generates=False)
    for prefix in _OPENAI_PREFIXES:
        get(f"{prefix}/models", catalogue.list_models)
        get(f"{prefix}/models/{{id:path}}", catalogue.one_model)
        get(f"{prefix}/user/balance", account.balance)
    return out


class _Get:
    """A GET route as an ASGI application."""

    def __init__(self, service: Service, route: str, handler: Callable[[Caller], Awaitable[Reply]]) -> None:
        self._service = service
        self._route = route
        self._handler = handler

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = _caller(self._service, scope, self._route)
        await _carry_out(self._handler(caller), caller, scope, receive, send)


class _Post:
    """A POST route as an ASGI application: limits and body first, then the handler."""

    def __init__(self, service: Service, route: str, handler: Handler, *, generates: bool) -> None:
        self._service = service
        self._route = route
        self._handler = handler
        self._generates = generates

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        caller = _caller(self._service, scope, self._route)
        limits, key = self._service.limits, caller.key
        try:
            if self._generates:
                self._service.check_open()
            body = await _read_body(scope, receive, self._service.settings.max_body_bytes)
            if key is not None:
                limits.enter(key)
        except ClientGone:
            return
        except ApiError as error:
            await refuse(error, scope, send, self._service)
            return
        try:
            await _carry_out(self._handler(caller, body), caller, scope, receive, send)
        finally:
            if key is not None:
                limits.leave(key)


def _caller(service: Service, scope: Scope, route: str) -> Caller:
    path = {str(k): str(v) for k, v in scope.get("path_params", {}).items()}
    return Caller(service, scope.get("rorqual.key"), scope["rorqual.request_id"], route, path)


async def _carry_out(
    work: Awaitable[Reply], caller: Caller, scope: Scope, receive: Receive, send: Send
) -> None:
    try:
        status = await respond(work, caller, dialect_of(scope["path"]), receive, send)
    except ClientGone:
        status = 499  # the usual number for a client that left
    caller.service.metrics.answered(caller.route, status)


async def _read_body(scope: Scope, receive: Receive, limit: int) -> bytes:
    """The whole body, or an error as soon as it is too long; memory never holds more than the limit."""
    headers = Headers(scope=scope)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json" and not (kind.startswith("application/") and kind.endswith("+json")):
        raise ApiError(
            415, f"content-type {kind[:100]!r}: send application/json", code="unsupported_media_type"
        )
    too_long = ApiError(
        413, f"the body is longer than {limit} bytes", code="body_too_large", headers={"connection": "close"}
    )
    length = headers.get("content-length", "")
    if length.isdigit() and int(length) > limit:
        raise too_long
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientGone
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise too_long
        parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _no_route(request: Request, error: HTTPException, service: Service) -> Response:
    """404 and 405 in the shape that clients read."""
    reason = HTTPStatus(error.status_code).phrase.lower()
    code = "method_not_allowed" if error.status_code == 405 else "not_found"
    known = ApiError(error.status_code, f"{request.method} {request.url.path[:200]}: {reason}", code=code)
    service.metrics.error(code)
    body = known.body(dialect_of(request.url.path), request.scope["rorqual.request_id"])
    return Response(body, known.status, {**(error.headers or {}), "content-type": "application/json"})


async def _page(caller: Caller) -> Reply:
    body, policy = page()
    headers = {
        "content-security-policy": policy,
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
    return Raw(body, "text/html; charset=utf-8", headers=headers)


async def _health(caller: Caller) -> Reply:
    return Json({"status": "ok"})


async def _ready(caller: Caller) -> Reply:
    ready = caller.service.ready
    return Json({"status": "ready" if ready else "not ready"}, status=200 if ready else 503)


async def _metrics(caller: Caller) -> Reply:
    return Raw(caller.service.metrics.exposition(), CONTENT_TYPE)


async def _openapi(caller: Caller) -> Reply:
    return Json(openapi(caller.service.models.names()))
