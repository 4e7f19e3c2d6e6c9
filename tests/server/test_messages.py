"""Anthropic's dialect: shapes, event order, errors."""

from __future__ import annotations

import json

import pytest

from rorqual.server.scripted import ScriptedAnswer
from rorqual.server.tools import HERMES

WEATHER = {
    "name": "weather",
    "description": "d",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}},
}


@pytest.fixture(scope="module")
def live(start):
    answers = (
        ScriptedAnswer(
            match="weather in",
            text="hm\n</think>\n\nLet me see.\n" + HERMES.write("weather", '{"city": "Rome"}'),
        ),
        ScriptedAnswer(match="fail", text="</think>abcdef", error="boom", error_after=12),
        ScriptedAnswer(text="hm\n</think>\n\nHello there!"),
    )
    return start(*answers, script={"thinks": True})


def ask(live, text="hi", **fields):
    body = {"model": "scripted", "max_tokens": 500, "messages": [{"role": "user", "content": text}], **fields}
    return live.client.post("/v1/messages", json=body)


def events(live, text="hi", **fields):
    body = {"model": "scripted", "max_tokens": 500, "messages": [{"role": "user", "content": text}], **fields}
    out = []
    for frame in live.frames("/v1/messages", body):
        name, data = frame.split(b"\n")
        event = json.loads(data.removeprefix(b"data: "))
        assert name == b"event: " + event["type"].encode()
        out.append(event)
    return out


@pytest.mark.parametrize("path", ["/v1/messages", "/anthropic/v1/messages"])
def test_row_60_whole(live, path):
    body = {
        "model": "scripted",
        "max_tokens": 500,
        "messages": [{"role": "user", "content": "hi"}],
        "system": "s",
    }
    answer = live.client.post(path, json=body).json()
    assert answer["type"] == "message"
    assert answer["role"] == "assistant"
    assert [b["type"] for b in answer["content"]] == ["thinking", "text"]
    assert answer["content"][0]["thinking"] == "hm"
    assert answer["content"][1]["text"] == "Hello there!"
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("end_turn", None)
    usage = answer["usage"]
    prompt = usage["input_tokens"] + usage["cache_read_input_tokens"]
    counted = live.client.post(
        f"{path}/count_tokens", json={k: v for k, v in body.items() if k != "max_tokens"}
    ).json()
    assert counted == {"input_tokens": prompt}


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking": {"type": "disabled"}},
        {"tools": [WEATHER], "tool_choice": {"type": "none"}},
        {"tools": [WEATHER, {"name": "time"}], "tool_choice": {"type": "tool", "name": "time"}},
    ],
)
def test_what_is_counted_is_what_would_be_sent(live, fields):
    """Tools that are not on offer are no part of the prompt, nor a thought that is switched off."""
    body = {"model": "scripted", "messages": [{"role": "user", "content": "hi"}], **fields}
    used = ask(live, "hi", **fields).json()["usage"]
    counted = live.client.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
    assert counted == used["input_tokens"] + used["cache_read_input_tokens"]


def test_row_60_event_order(live):
    """message_start, blocks opened, grown and closed one after the other, message_delta, message_stop."""
    seen = events(live, "weather in Rome", tools=[WEATHER])
    names = [e["type"] for e in seen]
    blocks = ["content_block_start", "content_block_delta", "content_block_stop"]
    assert [n for i, n in enumerate(names) if names[i - 1] != n] == [
        "message_start",
        *blocks * 3,
        "message_delta",
        "message_stop",
    ]
    kinds = [e["content_block"]["type"] for e in seen if e["type"] == "content_block_start"]
    assert kinds == ["thinking", "text", "tool_use"]
    assert [e["index"] for e in seen if e["type"] == "content_block_stop"] == [0, 1, 2]
    partial = "".join(
        e["delta"]["partial_json"] for e in seen if e.get("delta", {}).get("type") == "input_json_delta"
    )
    assert json.loads(partial) == {"city": "Rome"}
    assert seen[-2]["delta"] == {"stop_reason": "tool_use", "stop_sequence": None}
    assert seen[-2]["usage"]["output_tokens"] > 0
    assert (
        seen[0]["message"]["usage"]["input_tokens"]
        == seen[-2]["usage"]["input_tokens"] + seen[-2]["usage"]["cache_read_input_tokens"]
    )


@pytest.mark.parametrize("choice", [{"type": "auto"}, {"type": "any"}, {"type": "tool", "name": "weather"}])
def test_tools_round_trip(live, choice):
    """The call, and its result going back in as blocks."""
    answer = ask(live, "weather in Rome", tools=[WEATHER], tool_choice=choice)
    answer = answer.json()
    assert answer["stop_reason"] == "tool_use"
    call = answer["content"][-1]
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "weather", {"city": "Rome"})
    history = [
        {"role": "user", "content": "weather?"},
        {"role": "assistant", "content": answer["content"]},
        {
            "role": "user",
            "content": [
                {
                    "type": "tool_result",
                    "tool_use_id": call["id"],
                    "content": [{"type": "text", "text": "sunny"}],
                },
                {"type": "text", "text": "so?"},
            ],
        },
    ]
    assert ask(live, messages=history, tools=[WEATHER]).json()["stop_reason"] == "end_turn"


@pytest.mark.parametrize("user_id", ["alice@example.com", '{"device_id": "a"}', "7f.3", "a b"])
def test_a_user_id_is_any_text(live, user_id):
    """The pattern of DeepSeek's `user_id` is not Anthropic's."""
    assert ask(live, metadata={"user_id": user_id}).status_code == 200


def test_stop_sequence_and_max_tokens(live):
    answer = ask(live, stop_sequences=["there"]).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", "there")
    assert answer["content"][-1]["text"].strip() == "Hello"
    assert ask(live, max_tokens=4).json()["stop_reason"] == "max_tokens"


def test_a_begun_answer_is_continued(live):
    """A last assistant message is Anthropic's prefix completion."""
    said = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "The answer is"}]
    body = {"messages": said, "model": "scripted"}
    count = live.client.post("/v1/messages/count_tokens", json=body).json()["input_tokens"]
    assert count == len("<|user|>hi<|assistant|>The answer is\n") + 2


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"max_tokens": None}, "max_tokens"),
        ({"messages": []}, "messages"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
            "messages[0].content[0].type",
        ),
        (
            {
                "messages": [
                    {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "x", "content": "y"}]}
                ]
            },
            "tool_call_id",
        ),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "tools[0].type"),
        ({"mcp_servers": [{"url": "x"}]}, "mcp_servers"),
        ({"metadata": {"user_id": "x" * 513}}, "metadata.user_id"),
    ],
)
def test_row_60_errors_in_anthropics_shape(live, fields, named):
    answer = ask(live, **fields)
    body = answer.json()
    assert answer.status_code == 400
    assert body["type"] == "error"
    assert body["error"]["type"] == "invalid_request_error"
    assert named in body["error"]["message"]
    assert body["request_id"] == answer.headers["x-request-id"]


def test_unknown_model(live):
    answer = ask(live, model="claude")
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "not_found_error")


def test_a_failure_within_a_stream(live):
    assert events(live, "fail")[-1]["type"] == "error"


def test_what_is_ignored(live):
    """cache_control and the like do no harm."""
    system = [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}]
    answer = ask(
        live,
        system=system,
        service_tier="auto",
        metadata={"user_id": "u-1"},
        top_k=5,
        output_config={"effort": "high"},
    )
    assert answer.status_code == 200
