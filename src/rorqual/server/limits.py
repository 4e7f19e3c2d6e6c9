"""Per-key limits: requests and tokens a minute as leaky buckets, and requests open at one time."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

from rorqual.server.faults import ApiError
from rorqual.server.ledger import Key

_MINUTE = 60.0


class Bucket:
    """`limit` units a minute, refilled evenly. `take` may leave a debt, which later refills pay off."""

    def __init__(self, limit: int, clock: Callable[[], float]) -> None:
        self.limit = limit
        self._clock = clock
        self._level = float(limit)
        self._at = clock()

    def level(self) -> float:
        """What is left now."""
        now = self._clock()
        self._level = min(float(self.limit), self._level + (now - self._at) * self.limit / _MINUTE)
        self._at = now
        return self._level

    def take(self, amount: float) -> None:
        """Use `amount`."""
        self._level = self.level() - amount

    def wait_s(self, amount: float) -> float:
        """Seconds until `amount` is there."""
        return max(0.0, (amount - self.level()) * _MINUTE / self.limit)


@dataclass
class _Use:
    requests: Bucket | None
    tokens: Bucket | None
    open: int = 0


@dataclass
class Limits:
    """What each key has used lately. Kept in memory: a restart forgives at most one minute."""

    clock: Callable[[], float] = time.monotonic
    _uses: dict[str, _Use] = field(default_factory=dict)

    def enter(self, key: Key) -> None:
        """Count one request of `key` in, or raise 429 with Retry-After. `leave` must follow a success."""
        use = self._use(key)
        if key.concurrency is not None and use.open >= key.concurrency:
            raise self._refusal(
                f"{use.open} requests are open and the key's limit is {key.concurrency}", 1.0, key
            )
        if use.requests is not None:
            if use.requests.level() < 1:
                message = f"more than {use.requests.limit} requests a minute"
                raise self._refusal(message, use.requests.wait_s(1), key)
            use.requests.take(1)
        use.open += 1

    def leave(self, key: Key) -> None:
        """The request has ended."""
        self._use(key).open -= 1

    def check_tokens(self, key: Key, prompt_tokens: int) -> None:
        """Raise 429 where the prompt alone is more than the key may use now."""
        bucket = self._use(key).tokens
        if bucket is not None and bucket.level() < prompt_tokens:
            message = f"a prompt of {prompt_tokens} tokens at a limit of {bucket.limit} tokens a minute"
            raise self._refusal(message, bucket.wait_s(min(prompt_tokens, bucket.limit)), key)

    def spend_tokens(self, key: Key, tokens: int) -> None:
        """Count what a request used in the end."""
        bucket = self._use(key).tokens
        if bucket is not None:
            bucket.take(tokens)

    def headers(self, key: Key) -> dict[str, str]:
        """x-ratelimit-* for whatever is limited."""
        use, out = self._use(key), {}
        for name, bucket in (("requests", use.requests), ("tokens", use.tokens)):
            if bucket is not None:
                out[f"x-ratelimit-limit-{name}"] = str(bucket.limit)
                out[f"x-ratelimit-remaining-{name}"] = str(max(0, int(bucket.level())))
                out[f"x-ratelimit-reset-{name}"] = f"{bucket.wait_s(bucket.limit):.3f}s"
        if key.concurrency is not None:
            out["x-ratelimit-limit-concurrency"] = str(key.concurrency)
            out["x-ratelimit-remaining-concurrency"] = str(max(0, key.concurrency - use.open))
        return out

    def _use(self, key: Key) -> _Use:
        use = self._uses.setdefault(key.id, _Use(None, None))
        use.requests = self._bucket(use.requests, key.requests_per_minute)
        use.tokens = self._bucket(use.tokens, key.tokens_per_minute)
        return use

    def _bucket(self, bucket: Bucket | None, limit: int | None) -> Bucket | None:
        if limit is None:
            return None
        return bucket if bucket is not None and bucket.limit == limit else Bucket(limit, self.clock)

    def _refusal(self, message: str, wait_s: float, key: Key) -> ApiError:
        headers = {"retry-after": str(max(1, int(wait_s + 0.999))), **self.headers(key)}
        return ApiError(429, f"rate limit: {message}", code="rate_limit_exceeded", headers=headers)
