"""Bodies that are wrong, each answered with 400 (or 404) in the nested form that names the field."""

from __future__ import annotations

import json
import random
from typing import Any

import pytest

from rorqual.server.scripted import ScriptedAnswer

USER = [{"role": "user", "content": "hi"}]
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


@pytest.fixture(scope="module")
def live(start):
    return start(ScriptedAnswer(text="fine"), script={"max_model_len": 512})


def check_error(answer, status: int = 400) -> dict[str, Any]:
    """The nested form: message, type, param and a code that is text; nothing of Python or the file system."""
    assert answer.status_code == status, answer.text
    assert set(answer.json()) == {"error"}
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["code"], str)
    for internal in ("Traceback", ".py", "msgspec", "starlette", "object at 0x"):
        assert internal not in error["message"]
    return error


RAW = {
    "bad JSON": b'{"model": ',
    "empty": b"",
    "array": b"[]",
    "a number": b"3",
    "bad UTF-8": b'{"model": "scripted", "messages": [{"role": "user", "content": "\xff\xfe"}]}',
    "bad UTF-8, field unknown": b'{"model": "scripted", "messages": [{"role": "user", "content": "a"}], "x": "\xff"}',
    "NaN": b'{"model": "scripted", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
    "lone surrogate": b'{"model": "scripted", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "too deep": b'{"model": "scripted", "messages": [{"role": "user", "content": "a"}], "x": '
    + b"[" * 50000
    + b"]" * 50000
    + b"}",
    "two values": b'{"model": "scripted", "messages": [{"role": "user", "content": "a"}]} {}',
}


@pytest.mark.parametrize("name", RAW)
def test_row_28_bodies_that_are_no_json_object(live, name):
    """400 in the nested form, no internals leaked."""
    headers = {"content-type": "application/json"}
    check_error(live.client.post("/v1/chat/completions", content=RAW[name], headers=headers))


MESSAGES: dict[str, tuple[Any, str]] = {
    "missing": (None, "messages"),
    "empty": ([], "messages"),
    "a string": ("hi", "messages"),
    "bad role": ([{"role": "robot", "content": "a"}], "messages[0].role"),
    "no role": ([{"content": "a"}], "messages[0].role"),
    "no content": ([{"role": "user"}], "messages[0].content"),
    "content a number": ([{"role": "user", "content": 3}], "messages[0].content"),
    "content part without text": (
        [{"role": "user", "content": [{"type": "text"}]}],
        "messages[0].content[0].text",
    ),
    "image": (
        [{"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]}],
        "messages[0].content[1].type",
    ),
    "tool without id": ([*USER, {"role": "tool", "content": "1"}], "messages[1].tool_call_id"),
    "tool with unknown id": (
        [*USER, {"role": "tool", "content": "1", "tool_call_id": "x"}],
        "messages[1].tool_call_id",
    ),
    "calls of a user": (
        [
            {
                "role": "user",
                "content": "a",
                "tool_calls": [{"id": "1", "function": {"name": "f", "arguments": "{}"}}],
            }
        ],
        "messages[0].tool_calls",
    ),
}


@pytest.mark.parametrize("name", MESSAGES)
def test_rows_29_30_messages(live, name):
    """400 with the dotted path."""
    messages, param = MESSAGES[name]
    body = {"model": "scripted", **({"messages": messages} if messages is not None else {})}
    assert check_error(live.client.post("/v1/chat/completions", json=body))["param"] == param


FIELDS: list[tuple[str, Any]] = [
    ("temperature", 5),
    ("temperature", -1),
    ("temperature", "hot"),
    ("temperature", True),
    ("top_p", 2.0),
    ("top_p", -0.5),
    ("top_p", 0),
    ("min_p", 1.5),
    ("frequency_penalty", 2.5),
    ("presence_penalty", -2.5),
    ("repetition_penalty", 0),
    ("top_logprobs", 21),
    ("top_logprobs", 3),
    ("n", 0),
    ("n", 1000),
    ("n", 1.5),
    ("max_tokens", 0),
    ("max_tokens", -1),
    ("max_completion_tokens", 0),
    ("seed", "x"),
    ("stop", [str(i) for i in range(17)]),
    ("stop", [""]),
    ("stop", 3),
    ("stop_token_ids", [10**9]),
    ("logit_bias", {"x": 1}),
    ("response_format", {"type": "yaml"}),
    ("user_id", "a b"),
    ("stream", "yes"),
    ("tool_choice", "required"),
    ("tool_choice", {"type": "function", "function": {"name": "f"}}),
    ("tool_choice", "sometimes"),
    ("reasoning_effort", "heroic"),
    ("functions", [{"name": "f"}]),
    ("audio", {"voice": "x"}),
    ("modalities", ["text", "audio"]),
    ("guided_json", {"type": "object"}),
    ("use_beam_search", True),
]


@pytest.mark.parametrize(("param", "value"), FIELDS)
def test_rows_10_11_36_fields(live, param, value):
    """Apfel#235: 400 naming the field, whether out of range, of the wrong type or not offered."""
    error = check_error(live.chat(**{param: value}))
    assert error["param"].split(".")[0] == param
    assert param in error["message"]


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 2},
        {"top_p": 1},
        {"frequency_penalty": -2},
        {"top_k": -1},
        {"n": 1},
        {"stop": []},
    ],
)
def test_b076_edges_are_accepted(live, fields):
    """The ends of each range belong to it."""
    assert live.chat(**fields).status_code == 200


def test_row_36_unknown_fields_and_nulls_are_ignored(live):
    """What load generators and agents send beyond the documented fields; null means not given."""
    extra = {
        "service_tier": "auto",
        "prompt_cache_key": "x",
        "parallel_tool_calls": True,
        "metadata": {"a": "b"},
        "ignore_eos": None,
        "tools": None,
        "temperature": None,
        "response_format": None,
        "some_future_field": {"deep": [1, 2]},
    }
    assert live.chat(**extra).status_code == 200
    parts = [
        {
            "role": "user",
            "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
            "weight": 1,
        }
    ]
    assert (
        live.client.post("/v1/chat/completions", json={"model": "scripted", "messages": parts}).status_code
        == 200
    )


def test_b130_no_body_ends_the_server(live):
    """ggml-org/llama.cpp#10380: 500 bodies of hostile make: each a 200 or a 4xx, and the server lives."""
    rng = random.Random(1)
    seen = set()
    for _ in range(500):
        answer = live.client.post(
            "/v1/chat/completions", content=hostile(rng), headers={"content-type": "application/json"}
        )
        seen.add(answer.status_code)
        if answer.status_code != 200:
            check_error(answer, answer.status_code)
    assert seen <= {200, 400, 404}
    assert live.chat().status_code == 200


def hostile(rng: random.Random) -> bytes:
    """One body: a sound request with one or two fields put wrong, or bytes cut, doubled or replaced."""
    values: list[Any] = [
        -1,
        0,
        2**63,
        -(2**70),
        1e308,
        "",
        "x" * 10000,
        None,
        True,
        [],
        {},
        [[]] * 3,
        {"a": {"b": {}}},
        "\x00\u2028",
    ]
    names = [
        "messages",
        "model",
        "n",
        "max_tokens",
        "temperature",
        "stop",
        "tools",
        "logit_bias",
        "response_format",
        "seed",
        "stream",
    ]
    body: dict[str, Any] = {"model": "scripted", "messages": USER, "max_tokens": 2}
    for _ in range(rng.randint(1, 2)):
        body[rng.choice(names)] = rng.choice(values)
    if body.get("stream") is True and rng.random() < 0.9:
        body["stream"] = False
    data = json.dumps(body).encode()
    for _ in range(rng.choice([0, 0, 1, 3])):
        at = rng.randrange(len(data))
        data = data[:at] + bytes([rng.randrange(256)]) + data[at + rng.randint(0, 2) :]
    return data
