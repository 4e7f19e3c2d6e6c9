"""Who gets in, and what is said to those who do not."""

from __future__ import annotations

import base64
import json
import logging
import time

import httpx
import pytest
from starlette.routing import Route

from rorqual.server.app import build_app
from rorqual.server.scripted import ScriptedAnswer

BODY = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def guarded(start):
    return start(ScriptedAnswer(text="Hello!"), key={})


@pytest.fixture(scope="module")
def open_door(start):
    return start(ScriptedAnswer(text="Hello!"))


def test_b133_every_route_but_health_needs_a_key(guarded):
    """waybarrios/vllm-mlx#68: default deny, enumerated from the application, unknown paths included."""
    routes = [r for r in build_app(guarded.service).routes if isinstance(r, Route)]
    paths = {r.path.replace("{id:path}", "scripted"): r.methods for r in routes}
    assert len(paths) > 40
    open_paths = set()
    with httpx.Client(base_url=guarded.url, trust_env=False) as stranger:
        for path, methods in {**paths, "/unknown": {"GET"}, "/v1/unknown": {"POST"}}.items():
            for method in methods:
                for headers in ({}, {"authorization": "Bearer rq-0-wrong"}, {"x-api-key": "wrong"}):
                    answer = stranger.request(method, path, headers=headers)
                    if answer.status_code != 401:
                        open_paths.add(path)
                    elif method != "HEAD":
                        assert "error" in answer.json()
    assert open_paths == {"/health"}


@pytest.mark.parametrize("header", ["Bearer", "bearer", "x-api-key", "Basic"])
def test_row_33_three_ways_to_send_a_key(guarded, header):
    """Bearer, x-api-key as Anthropic's clients do, Basic as a browser does."""
    value = guarded.key if header != "Basic" else base64.b64encode(f"me:{guarded.key}".encode()).decode()
    headers = {header: value} if header == "x-api-key" else {"authorization": f"{header} {value}"}
    assert httpx.get(f"{guarded.url}/v1/models", headers=headers, trust_env=False).status_code == 200


@pytest.mark.parametrize(
    "value", ["", "Bearer", "rq-1-2", "Basic %%%", "Basic cnE=", "Digest x", "Bearer é".encode()]
)
def test_row_33_malformed(guarded, value):
    """401 with the nested error and code, however it is wrong."""
    answer = httpx.post(
        f"{guarded.url}/v1/chat/completions", json=BODY, headers={"authorization": value}, trust_env=False
    )
    error = answer.json()["error"]
    assert answer.status_code == 401
    assert (error["type"], error["code"]) == ("authentication_error", "invalid_api_key")
    assert answer.headers["www-authenticate"].startswith("Bearer")


def test_the_page_asks_a_browser_for_the_key(guarded):
    """So that it can be opened without a header."""
    answer = httpx.get(f"{guarded.url}/", trust_env=False)
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"].startswith("Basic")


def test_anthropic_paths_refuse_in_their_own_shape(guarded):
    answer = httpx.post(f"{guarded.url}/v1/messages", json={}, trust_env=False).json()
    assert answer["type"] == "error"
    assert answer["error"]["type"] == "authentication_error"


def test_an_open_door_is_for_this_machine_only(open_door):
    """A foreign name in Host is what a rebinding web page sends."""
    for host, status in (
        ("127.0.0.1:80", 200),
        ("localhost", 200),
        ("[::1]:1", 200),
        ("evil.example", 403),
        ("evil.example:8000", 403),
    ):
        answer = open_door.client.get("/v1/models", headers={"host": host})
        assert answer.status_code == status
    assert answer.json()["error"]["code"] == "host_not_allowed"


def test_row_41_cors_is_closed(open_door):
    """No header lets another origin read or send anything."""
    headers = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    preflight = open_door.client.options("/v1/chat/completions", headers=headers)
    assert preflight.status_code >= 400
    answer = open_door.client.post(
        "/v1/chat/completions", json=BODY, headers={"origin": "https://evil.example"}
    )
    for seen in (preflight, answer):
        assert not any(name.startswith("access-control") for name in seen.headers)


def test_row_41_an_allow_list(start):
    """The listed origin, never reflected with credentials."""
    live = start(settings={"allow_origins": ("https://good.example",)})
    for origin, allowed in (("https://good.example", True), ("https://evil.example", False), ("null", False)):
        headers = {
            "origin": origin,
            "access-control-request-method": "POST",
            "access-control-request-headers": "content-type",
        }
        preflight = live.client.options("/v1/chat/completions", headers=headers)
        assert (preflight.headers.get("access-control-allow-origin") == origin) is allowed
        assert "access-control-allow-credentials" not in preflight.headers


def test_a_listed_origin_may_send_what_client_libraries_send(start):
    """x-stainless-* and anthropic-* headers, of which there are new ones with every release."""
    live = start(settings={"allow_origins": ("https://good.example",)})
    for asked in ("authorization,x-stainless-lang,x-stainless-timeout", "anthropic-beta,x-api-key"):
        headers = {
            "origin": "https://good.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": asked,
        }
        preflight = live.client.options("/v1/messages", headers=headers)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-headers"] == asked


def test_a_form_of_another_site_is_not_taken(open_door):
    """A cross-site request without preflight cannot say application/json: 415 for all that it can say."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""):
        headers = {"content-type": kind} if kind else {}
        answer = open_door.client.post(
            "/v1/chat/completions", content=json.dumps(BODY).encode(), headers=headers
        )
        assert answer.status_code == 415
        assert answer.json()["error"]["code"] == "unsupported_media_type"


def test_row_38_request_ids(open_door, caplog):
    """Echoed when sent, made otherwise, in the log; what could break a log line is replaced."""
    with caplog.at_level(logging.INFO, logger="rorqual.access"):
        answer = open_door.client.post("/v1/chat/completions", json=BODY, headers={"x-request-id": "mine-1"})
        end = time.monotonic() + 10
        while not any("request_id=mine-1" in r.getMessage() for r in caplog.records):
            assert time.monotonic() < end  # the line is written once the answer is out
    assert answer.headers["x-request-id"] == "mine-1"
    assert any(
        "request_id=mine-1" in r.getMessage() and "status=200" in r.getMessage() for r in caplog.records
    )
    for bad in ("x" * 200, "a\tb"):
        made = open_door.client.get("/health", headers={"x-request-id": bad}).headers["x-request-id"]
        assert made.startswith("req_")
    assert open_door.client.get("/nowhere").headers["x-request-id"].startswith("req_")


def test_two_requests_under_one_id_are_two_charges(open_door):
    """A client's id need not be unique."""
    for _ in range(2):
        assert (
            open_door.client.post(
                "/v1/chat/completions", json=BODY, headers={"x-request-id": "same"}
            ).status_code
            == 200
        )


# Limits and balances through the API


def test_row_64_limits_show_in_headers_and_as_429(start):
    live = start(
        ScriptedAnswer(text="Hello!"),
        key={"requests_per_minute": 2, "tokens_per_minute": 10000, "concurrency": 5},
    )
    first = live.chat()
    assert first.headers["x-ratelimit-limit-requests"] == "2"
    assert first.headers["x-ratelimit-remaining-requests"] == "1"
    assert first.headers["x-ratelimit-remaining-concurrency"] == "4"
    assert int(first.headers["x-ratelimit-limit-tokens"]) == 10000
    live.chat()
    refused = live.chat()
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "rate_limit_error"


def test_row_61_balance_and_402(start):
    """A token costs one unit here; after it is spent, 402 with the nested error; the balance is in DeepSeek's form."""
    prices = {"currency": "CNY", "price": [{"miss": "0", "output": "1000000"}]}
    live = start(
        ScriptedAnswer(text="Hello!"),
        key={"metered": True, "granted": 2 * 10**9, "topped_up": 10 * 10**9},
        prices=prices,
    )
    assert live.client.get("/user/balance").json() == {
        "is_available": True,
        "balance_infos": [
            {
                "currency": "CNY",
                "total_balance": "12.00",
                "granted_balance": "2.00",
                "topped_up_balance": "10.00",
            }
        ],
    }
    assert live.chat(max_tokens=5).status_code == 200
    info = live.client.get("/user/balance").json()["balance_infos"][0]
    assert (info["granted_balance"], info["topped_up_balance"]) == ("0.00", "7.00")
    assert live.chat().status_code == 200
    refused = live.chat()
    assert refused.status_code == 402
    assert refused.json()["error"]["code"] == "insufficient_balance"
    assert live.client.get("/user/balance").json()["is_available"] is (
        live.service.ledger.all_keys()[0].balance > 0
    )
