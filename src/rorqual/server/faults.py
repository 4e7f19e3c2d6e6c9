"""What the API answers when it cannot do as asked: one class, and the two shapes in which clients read it.

The nested OpenAI form is the only one whose message every client library shows; a bare string or a `detail`
key loses it. Anthropic's clients read their own form on their own routes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from rorqual.errors import RequestError

_OPENAI_TYPES = {
    401: "authentication_error",
    402: "insufficient_balance",
    403: "permission_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPES = {
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}


class ApiError(Exception):
    """An answer other than 200. `code` is a short cause for machines, `param` the dotted field at fault."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.headers = dict(headers or {})

    @property
    def type(self) -> str:
        """OpenAI's error type for the status."""
        return _OPENAI_TYPES.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )

    def openai(self) -> dict[str, Any]:
        """`{"error": {message, type, param, code}}`."""
        return {"error": {"message": self.message, "type": self.type, "param": self.param, "code": self.code}}

    def anthropic(self, request_id: str) -> dict[str, Any]:
        """`{"type": "error", "error": {type, message}, "request_id": …}`."""
        fallback = "api_error" if self.status >= 500 else "invalid_request_error"
        kind = _ANTHROPIC_TYPES.get(self.status, fallback)
        message = f"{self.param}: {self.message}" if self.param else self.message
        return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}

    def body(self, dialect: str, request_id: str) -> bytes:
        """The JSON body for `dialect` ("openai" or "anthropic")."""
        return msgspec.json.encode(self.anthropic(request_id) if dialect == "anthropic" else self.openai())


def invalid(message: str, param: str | None = None, code: str = "invalid_value") -> ApiError:
    """400: the request itself is wrong; `param` says where."""
    return ApiError(400, message, code=code, param=param)


def from_request_error(error: RequestError) -> ApiError:
    """The engine's refusal of a request, as an answer. A full queue is not the client's fault: 503, retry."""
    if error.code == "queue_full":
        return overloaded(str(error))
    return ApiError(400, str(error), code=error.code, param=error.param)


def overloaded(message: str, retry_after_s: int = 1) -> ApiError:
    """503 with Retry-After: nothing is wrong with the request, come back later."""
    return ApiError(503, message, code="overloaded", headers={"retry-after": str(retry_after_s)})


def internal() -> ApiError:
    """500 that gives nothing away; the log has the rest under the request id."""
    return ApiError(
        500, "internal error; the server's log has the cause under this request id", code="internal_error"
    )


def model_not_found(name: str | None, known: list[str]) -> ApiError:
    """404 naming what could have been asked for."""
    asked = "no model was named" if not name else f"the model {name[:200]!r} does not exist"
    return ApiError(
        404, f"{asked}; this server has: {', '.join(known)}", code="model_not_found", param="model"
    )
