"""Who asks, through which route, and when: what a request carries besides its body."""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import dataclass, field
from datetime import datetime, timezone

from rorqual.server.faults import ApiError
from rorqual.server.ledger import Key
from rorqual.server.service import Service


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _loop_time() -> float:
    return asyncio.get_running_loop().time()


@dataclass
class Caller:
    """One request's sender. `id` is unique; `request_id` may be the client's own and need not be."""

    service: Service
    key: Key | None  # None: the door is open
    request_id: str
    route: str
    path: dict[str, str] = field(default_factory=dict)  # parameters of the path
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    moment: datetime = field(default_factory=_now)  # prices the request
    arrived: float = field(default_factory=_loop_time)

    def admit(self, prompt_tokens: int) -> None:
        """402 where the balance is used up, 429 where the key's tokens of this minute are."""
        if self.key is None:
            return
        if self.key.metered and self.key.balance <= 0:
            raise ApiError(402, "the balance of this key is used up; top it up", code="insufficient_balance")
        self.service.limits.check_tokens(self.key, prompt_tokens)

    def spend(self, tokens: int) -> None:
        """Count tokens against the key's limit."""
        if self.key is not None:
            self.service.limits.spend_tokens(self.key, tokens)

    def headers(self) -> dict[str, str]:
        """x-ratelimit-* of the key."""
        return self.service.limits.headers(self.key) if self.key is not None else {}

    def cache_salt(self, user_id: str | None) -> str:
        """Keeps the prefix caches of keys, and of a key's users, apart."""
        key_id = self.key.id if self.key is not None else ""
        return f"{key_id}:{user_id or ''}" if key_id or user_id else ""

    def require_admin(self) -> None:
        """403 unless the key is an administrator's or the door is open."""
        if self.key is not None and not self.key.admin:
            raise ApiError(403, "this needs an administrator's key", code="admin_required")
