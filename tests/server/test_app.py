"""Routes: what is there, what is not, and the figures."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import pytest

from rorqual.server.ledger import Ledger
from rorqual.server.openapi import openapi
from rorqual.server.scripted import ScriptedAnswer


@pytest.fixture(scope="module")
def live(start):
    answers = (ScriptedAnswer(match="endless", text="ab", endless=True), ScriptedAnswer(text="Hello!"))
    prices = {"price": [{"model": "scripted", "hit": "0.5", "miss": "1", "output": "2"}]}
    return start(*answers, settings={"max_body_bytes": 100_000}, prices=prices)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nope", 404),
        ("POST", "/v1/nope", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("POST", "/health", 405),
    ],
)
def test_row_34_no_route(live, method, path, status):
    """Nested JSON, and Allow on a wrong method."""
    answer = live.client.request(method, path)
    assert answer.status_code == status
    assert isinstance(answer.json()["error"]["message"], str)
    assert status == 404 or answer.headers["allow"]


def test_row_34_in_anthropics_shape(live):
    answer = live.client.get("/v1/messages")
    assert answer.status_code == 405
    assert answer.json()["type"] == "error"


def test_row_35_a_body_that_says_it_is_long(live):
    """Refused from its length, nested JSON."""
    answer = live.client.post(
        "/v1/chat/completions", content=b"x" * 100_001, headers={"content-type": "application/json"}
    )
    assert answer.status_code == 413
    assert answer.json()["error"]["code"] == "body_too_large"


def test_row_35_a_body_in_chunks(live):
    """Refused as soon as it has grown too long, whatever is still to come."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    with live.raw(head) as sock:
        for _ in range(11):
            sock.sendall(b"2710\r\n" + b" " * 10_000 + b"\r\n")
        assert sock.recv(65536).startswith(b"HTTP/1.1 413")


def test_row_32_models(live):
    """The list, one of them, ids with slashes, our extra fields, 404 for others."""
    listed = live.client.get("/v1/models").json()
    assert listed["object"] == "list"
    entry = listed["data"][0]
    assert {entry[k] for k in ("id", "object", "owned_by")} == {"scripted", "model", "rorqual"}
    assert entry["max_model_len"] == 4096
    assert entry["prices"] == {"currency": "USD", "cache_hit": "0.50", "cache_miss": "1.00", "output": "2.00"}
    assert [e["id"] for e in listed["data"]] == ["scripted", "alias"]
    assert live.client.get("/v1/models/scripted").json()["id"] == "scripted"
    missing = live.client.get("/v1/models/org/name")
    assert missing.status_code == 404
    assert missing.json()["error"]["code"] == "model_not_found"
    assert "org/name" in missing.json()["error"]["message"]


def test_row_39_health_and_ready_differ_while_draining(start):
    live = start()
    assert live.client.get("/health").status_code == live.client.get("/ready").status_code == 200
    live.service.refuse_new()
    assert live.client.get("/health").status_code == 200
    assert live.client.get("/ready").status_code == 503
    refused = live.chat()
    assert refused.status_code == 503
    assert int(refused.headers["retry-after"]) >= 1


def metric(text: str, name: str) -> float:
    return sum(
        float(v) for v in re.findall(rf"^{re.escape(name)}(?:{{[^}}]*}})? ([0-9.e+-]+)", text, re.MULTILINE)
    )


def test_row_40_metrics_are_the_sum_of_usages(start):
    """After 30 requests, whole and streamed, and three errors."""
    live = start(ScriptedAnswer(text="Hello!"))
    prompt = completion = cached = 0
    for i in range(30):
        body = {
            "model": "scripted",
            "messages": [{"role": "user", "content": "x" * i}],
            "max_tokens": 1 + i % 5,
        }
        if i % 2:
            usage = live.client.post("/v1/chat/completions", json=body).json()["usage"]
        else:
            frames = live.frames("/v1/chat/completions", {**body, "stream_options": {"include_usage": True}})
            usage = json.loads(frames[-2][6:])["usage"]
        prompt, completion = prompt + usage["prompt_tokens"], completion + usage["completion_tokens"]
        cached += usage["prompt_cache_hit_tokens"]
    for _ in range(3):
        live.chat(temperature=9)
    text = live.client.get("/metrics").text
    assert metric(text, "vllm:prompt_tokens_total") == prompt
    assert metric(text, "vllm:generation_tokens_total") == completion
    assert metric(text, "vllm:prompt_tokens_cached_total") == cached
    assert metric(text, "vllm:request_success_total") == 30
    assert metric(text, "vllm:time_to_first_token_seconds_count") == 30
    assert metric(text, "vllm:inter_token_latency_seconds_count") == completion - 30
    assert metric(text, "vllm:e2e_request_latency_seconds_count") == 30
    assert metric(text, "vllm:num_requests_running") == metric(text, "vllm:num_requests_waiting") == 0
    assert metric(text, "rorqual:errors_total") == 3
    charged = next(live.service.ledger.sums())
    assert (charged.hit + charged.miss, charged.output, charged.requests) == (prompt, completion, 30)
    assert "request_id=" in text, "exemplars carry the request's id"


def test_an_aborted_request_is_paid_as_far_as_it_came(start):
    """What was computed before the client left is in the ledger, as an abort."""
    live = start(ScriptedAnswer(text="ab", endless=True, delay_s=0.002))
    request = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with live.client.stream("POST", "/v1/chat/completions", json=request) as response:
        seen = next(response.iter_bytes())
        assert seen
    while live.stats() != (0, 0) or not list(live.service.ledger.sums()):
        pass
    row = next(live.service.ledger.sums())
    assert row.requests == 1
    assert row.output >= 1


def test_what_was_streamed_before_the_server_closed_is_paid(start):
    """As far as it came, under the code of the error that ended it."""
    live = start(ScriptedAnswer(text="ab", endless=True, delay_s=0.002))
    request = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with live.client.stream("POST", "/v1/chat/completions", json=request) as response:
        parts = response.iter_bytes()
        while b'"content":"a' not in next(parts):
            pass
        live.loop_call(live.service.end_open)
        assert b"shutting_down" in b"".join(parts)
    while (row := live.service.ledger._db.execute("SELECT output, outcome FROM charges").fetchone()) is None:
        pass
    assert row[0] >= 1
    assert row[1] == "shutting_down"


@pytest.mark.parametrize("crash", [True, False])
def test_a_failure_of_the_engine_costs_nothing(start, crash):
    live = start(ScriptedAnswer(text="abc", error="boom", error_after=2, crash=crash))
    assert live.chat().status_code == 500
    assert not list(live.service.ledger.sums())


def test_a_locked_ledger_holds_up_only_its_own_answer(start, tmp_path):
    """Another process writes for a while: others are answered, and the charge is made once it lets go."""
    live = start(ScriptedAnswer(text="Hello!"))
    live.service.ledger = Ledger(tmp_path / "ledger.db")
    other = sqlite3.connect(tmp_path / "ledger.db", isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(live.chat)
        began = time.monotonic()
        while live.stats() != (0, 0) or time.monotonic() - began < 0.1:
            assert live.client.get("/health").elapsed.total_seconds() < 2
        assert not answer.done()
        other.execute("ROLLBACK")
        assert answer.result().status_code == 200
    other.close()
    assert [row.requests for row in live.service.ledger.sums()] == [1]


def test_openapi_describes_every_route(live):
    """Served as it is built, and each request struct is in it with its ranges."""
    served = live.client.get("/openapi.json").json()
    assert served == json.loads(json.dumps(openapi(["scripted", "alias"])))
    chat = served["components"]["schemas"]["ChatRequest"]
    jsonschema.Draft202012Validator.check_schema(chat)
    assert chat["properties"]["temperature"]["anyOf"][0]["maximum"] == 2
    assert chat["required"] == ["messages"]
    assert "/v1/messages" in served["paths"]


def test_the_page_is_one_file_that_loads_nothing_else(live):
    """No address of another host in it, and a policy that would not let it."""
    answer = live.client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "src=" not in answer.text
    assert "http://" not in answer.text.replace("http://www.w3.org/2000/svg", "")
    assert "https://" not in answer.text


# Models and adapters that come and go


def test_row_68_no_models_at_run_time_where_there_is_no_loader(live):
    answer = live.client.post("/v1/models/load", json={"model": "x", "path": "/x"})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "unsupported_value"


def test_row_68_adapters_are_refused_by_name_where_the_engine_has_none(live):
    answer = live.client.post("/v1/load_lora_adapter", json={"lora_name": "x", "lora_path": "/x"})
    assert answer.status_code == 400
    assert "adapters" in answer.json()["error"]["message"]


def test_row_68_a_model_comes_and_goes_without_dropping_streams(start):
    """A second model is loaded, streams, is unloaded in mid-stream, and the stream runs to its end."""
    from rorqual.server.loading import scripted
    from rorqual.server.scripted import Script

    slow = Script(answers=(ScriptedAnswer(text="ab" * 50, delay_s=0.005),))
    live = start(load=lambda name, path: scripted(name, slow, 8))
    assert live.client.post("/v1/models/load", json={"model": "second", "path": "x"}).status_code == 200
    assert live.client.post("/v1/models/load", json={"model": "second", "path": "x"}).status_code == 409
    body = {"model": "second", "messages": [{"role": "user", "content": "hi"}], "stream": True}
    with live.client.stream("POST", "/v1/chat/completions", json=body) as response:
        parts = response.iter_bytes()
        got = next(parts)
        assert live.client.post("/v1/models/unload", json={"model": "second"}).json()["deleted"]
        got += b"".join(parts)
    assert got.endswith(b"data: [DONE]\n\n")
    assert got.count(b'"content":"a"') == 50
    assert live.chat(model="second").status_code == 404
    assert live.client.post("/v1/models/unload", json={"model": "scripted"}).status_code == 409


def test_row_68_only_an_administrators_key_loads_models(start):
    live = start(key={})
    assert live.client.post("/v1/models/unload", json={"model": "scripted"}).status_code == 403
