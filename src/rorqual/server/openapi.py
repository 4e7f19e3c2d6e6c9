"""GET /openapi.json: the request bodies as the server itself checks them, and every status that it may
answer.
"""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import msgspec

from rorqual import __version__
from rorqual.server.catalogue import LoadAdapter, LoadModel, UnloadAdapter, UnloadModel
from rorqual.server.decisions import DecisionsRequest
from rorqual.server.messages_input import CountRequest, MessagesRequest
from rorqual.server.protocol import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from rorqual.server.responses_input import ResponsesRequest

_OPERATIONS: tuple[tuple[str, str, type[msgspec.Struct], bool], ...] = (
    ("/v1/chat/completions", "Answer a conversation (OpenAI, DeepSeek)", ChatRequest, True),
    ("/v1/completions", "Continue a text, or fill in its middle", CompletionRequest, True),
    ("/v1/responses", "Answer a conversation (OpenAI Responses), nothing stored", ResponsesRequest, True),
    ("/v1/messages", "Answer a conversation (Anthropic)", MessagesRequest, True),
    ("/v1/messages/count_tokens", "Tokens of a conversation (Anthropic)", CountRequest, False),
    ("/v1/decisions", "Answer typed questions by probabilities", DecisionsRequest, False),
    ("/v1/tokenize", "Token ids of a text or conversation", TokenizeRequest, False),
    ("/v1/detokenize", "Text of token ids", DetokenizeRequest, False),
    ("/v1/models/load", "Serve another model folder (administrators)", LoadModel, False),
    ("/v1/models/unload", "Serve a model no more (administrators)", UnloadModel, False),
    ("/v1/load_lora_adapter", "Serve an adapter (administrators)", LoadAdapter, False),
    ("/v1/unload_lora_adapter", "Serve an adapter no more (administrators)", UnloadAdapter, False),
)
_GETS = (
    ("/v1/models", "Names that a request may ask for", "application/json"),
    ("/v1/models/{id}", "One of them", "application/json"),
    ("/v1/user/balance", "What the key has left (DeepSeek)", "application/json"),
    ("/health", "Alive; the only path that needs no key", "application/json"),
    ("/ready", "Whether a request sent now would be served", "application/json"),
    ("/metrics", "Figures for Prometheus", "application/openmetrics-text"),
    ("/openapi.json", "This document", "application/json"),
    ("/", "The chat page", "text/html"),
)
_COMMON = {
    "401": "No key or a wrong one",
    "403": "Not allowed with this key or host",
    "500": "A fault of the server",
}
_POST_ERRORS = {
    "400": "The request is wrong; `param` says where",
    "402": "The balance is used up",
    "404": "No such model",
    "409": "The name is taken, or the model is the last",
    "413": "The body is too long",
    "415": "The body is not application/json",
    "429": "The key's limit; see Retry-After",
    "503": "Too much is open, or the server is shutting down; see Retry-After",
}


def openapi(models: list[str]) -> dict[str, Any]:
    """The document of a server with these models."""
    document = copy.deepcopy(_document())
    for name in _GENERATING:
        document["components"]["schemas"][name]["properties"]["model"] = {"type": "string", "enum": models}
    return document


_GENERATING = (
    "ChatRequest",
    "CompletionRequest",
    "ResponsesRequest",
    "MessagesRequest",
    "CountRequest",
    "DecisionsRequest",
)


@cache
def _document() -> dict[str, Any]:
    template = "#/components/schemas/{name}"
    _, schemas = msgspec.json.schema_components([op[2] for op in _OPERATIONS], ref_template=template)
    schemas["Error"] = _error_schema()
    paths: dict[str, Any] = {}
    for path, summary, body, streams in _OPERATIONS:
        paths[path] = {"post": _post(path, summary, body, streams)}
    for path, summary, kind in _GETS:
        paths[path] = {"get": _get(path, summary, kind)}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Rorqual", "version": __version__},
        "security": [{"bearer": []}, {"key": []}, {}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {
                "bearer": {"type": "http", "scheme": "bearer"},
                "key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
            },
        },
    }


def _post(path: str, summary: str, body: type[msgspec.Struct], streams: bool) -> dict[str, Any]:
    content: dict[str, Any] = {"application/json": {"schema": {"type": "object"}}}
    if streams:
        content["text/event-stream"] = {}
    reference = {"$ref": f"#/components/schemas/{body.__name__}"}
    return {
        "summary": summary,
        "operationId": "post" + path.replace("/", "_"),
        "requestBody": {"required": True, "content": {"application/json": {"schema": reference}}},
        "responses": {
            "200": {"description": "The answer", "content": content},
            **_errors({**_COMMON, **_POST_ERRORS}),
        },
    }


def _get(path: str, summary: str, kind: str) -> dict[str, Any]:
    errors = dict(_COMMON)
    operation: dict[str, Any] = {
        "summary": summary,
        "operationId": "get" + path.replace("/", "_").strip("{}"),
    }
    if "{id}" in path:
        operation["parameters"] = [
            {"name": "id", "in": "path", "required": True, "schema": {"type": "string"}}
        ]
        errors["404"] = "No such model"
    if path == "/ready":
        errors["503"] = "Not now"
    schema = {"type": "object"} if kind == "application/json" else {"type": "string"}
    content = {kind: {"schema": schema}}
    return {
        **operation,
        "responses": {"200": {"description": "The answer", "content": content}, **_errors(errors)},
    }


def _errors(described: dict[str, str]) -> dict[str, Any]:
    schema = {"schema": {"$ref": "#/components/schemas/Error"}}
    return {
        status: {"description": text, "content": {"application/json": schema}}
        for status, text in described.items()
    }


def _error_schema() -> dict[str, Any]:
    nested = {
        "type": "object",
        "properties": {
            "message": {"type": "string"},
            "type": {"type": "string"},
            "param": {"type": ["string", "null"]},
            "code": {"type": ["string", "null"]},
        },
        "required": ["message", "type"],
    }
    return {"type": "object", "properties": {"error": nested}}
