"""Limits of a key on a clock that the test turns."""

from __future__ import annotations

import pytest

from rorqual.server.faults import ApiError
from rorqual.server.ledger import Ledger
from rorqual.server.limits import Limits


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def key_with(**limits: int):
    ledger = Ledger(":memory:")
    key = ledger.find_key(ledger.make_key("k", **limits))
    ledger.close()
    return key


def test_requests_a_minute():
    """3 at once, then one every 20 seconds; the refusal says how long to wait."""
    clock, key = Clock(), key_with(requests_per_minute=3)
    limits = Limits(clock)
    for _ in range(3):
        limits.enter(key)
    with pytest.raises(ApiError) as refused:
        limits.enter(key)
    assert refused.value.status == 429
    assert refused.value.headers["retry-after"] == "20"
    assert refused.value.headers["x-ratelimit-remaining-requests"] == "0"
    clock.now += 20
    limits.enter(key)


def test_concurrency():
    """A slot is free again when a request has ended."""
    key = key_with(concurrency=2)
    limits = Limits(Clock())
    limits.enter(key)
    limits.enter(key)
    assert limits.headers(key)["x-ratelimit-remaining-concurrency"] == "0"
    with pytest.raises(ApiError):
        limits.enter(key)
    limits.leave(key)
    limits.enter(key)


def test_tokens_a_minute():
    """Counted when a request ends, a debt included, and paid off evenly."""
    clock, key = Clock(), key_with(tokens_per_minute=600)
    limits = Limits(clock)
    limits.check_tokens(key, 600)
    limits.spend_tokens(key, 900)
    with pytest.raises(ApiError) as refused:
        limits.check_tokens(key, 1)
    assert refused.value.headers["retry-after"] == "31"
    clock.now += 31
    limits.check_tokens(key, 10)


def test_a_key_without_limits_has_no_headers():
    limits = Limits(Clock())
    key = key_with()
    limits.enter(key)
    limits.check_tokens(key, 10**9)
    assert limits.headers(key) == {}


def test_keys_do_not_share_their_limits():
    limits = Limits(Clock())
    limits.enter(key_with(requests_per_minute=1))
    limits.enter(key_with(requests_per_minute=1))
