"""The Responses API: events in order, items, and what a server without memory says."""

from __future__ import annotations

import json

import pytest

from rorqual.server.scripted import ScriptedAnswer
from rorqual.server.tools import HERMES

WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
}
PATCH = {"type": "custom", "name": "patch", "description": "free text", "format": {"type": "text"}}


@pytest.fixture(scope="module")
def live(start):
    answers = (
        ScriptedAnswer(
            match="weather in",
            text="why not\n</think>\n\nLet me see.\n" + HERMES.write("weather", '{"city": "Rome"}'),
        ),
        ScriptedAnswer(
            match="patch it", text="</think>" + HERMES.write("patch", '{"input": "*** Begin\\n+a"}')
        ),
        ScriptedAnswer(match="endless", text="</think>" + "ab" * 4000),
        ScriptedAnswer(match="fail", text="</think>abcdef", error="boom", error_after=12),
        ScriptedAnswer(text="thinking\n</think>\n\nHello!"),
    )
    return start(*answers, script={"thinks": True})


def ask(live, text="hi", **fields):
    return live.client.post("/v1/responses", json={"model": "scripted", "input": text, **fields})


def events(live, text="hi", **fields):
    frames = live.frames("/v1/responses", {"model": "scripted", "input": text, **fields})
    out = []
    for i, frame in enumerate(frames):
        name, data = frame.split(b"\n")
        event = json.loads(data.removeprefix(b"data: "))
        assert name == b"event: " + event["type"].encode()
        assert event["sequence_number"] == i
        out.append(event)
    return out


def test_row_59_whole(live):
    answer = ask(live).json()
    assert answer["object"] == "response"
    assert answer["status"] == "completed"
    assert answer["store"] is False
    assert [item["type"] for item in answer["output"]] == ["reasoning", "message"]
    assert answer["output"][0]["content"] == [{"type": "reasoning_text", "text": "thinking"}]
    assert answer["output"][1]["content"][0]["text"] == "Hello!"
    usage = answer["usage"]
    assert usage["input_tokens"] + usage["output_tokens"] == usage["total_tokens"]
    assert usage["output_tokens_details"]["reasoning_tokens"] > 0


def test_row_59_event_order(live):
    """As the documentation and codex have it; numbers in order; no [DONE] (every frame is JSON)."""
    seen = events(live)
    names = [e["type"] for e in seen]
    text = "response.output_text.delta"
    thought = "response.reasoning_text.delta"
    assert [n for i, n in enumerate(names) if n not in (text, thought) or names[i - 1] != n] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        thought,
        "response.reasoning_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.output_item.added",
        "response.content_part.added",
        text,
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert "".join(e["delta"] for e in seen if e["type"] == text) == "Hello!"
    assert seen[-1]["response"]["output"][1]["content"][0]["text"] == "Hello!"
    assert seen[-1]["response"]["usage"]["output_tokens"] > 0


def test_row_59_tools(live):
    """The call as an item of its own, its arguments in pieces; then its result goes back in."""
    seen = events(live, "weather in Rome", tools=[WEATHER])
    added = [e["item"]["type"] for e in seen if e["type"] == "response.output_item.added"]
    assert added == ["reasoning", "message", "function_call"]
    arguments = "".join(e["delta"] for e in seen if e["type"] == "response.function_call_arguments.delta")
    call = seen[-1]["response"]["output"][-1]
    assert call["arguments"] == arguments == '{"city": "Rome"}'
    assert call["status"] == "completed"
    history = [
        {"role": "user", "content": [{"type": "input_text", "text": "weather?"}]},
        *seen[-1]["response"]["output"],
        {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"},
    ]
    assert ask(live, history, tools=[WEATHER]).json()["status"] == "completed"


def test_a_free_form_tool(live):
    """codex's patch tool: its text comes back as `input`, not as JSON."""
    answer = ask(live, "patch it", tools=[PATCH, {"type": "web_search"}]).json()
    call = answer["output"][-1]
    assert (call["type"], call["name"], call["input"]) == ("custom_tool_call", "patch", "*** Begin\n+a")
    history = [
        {"role": "user", "content": "x"},
        call,
        {"type": "custom_tool_call_output", "call_id": call["call_id"], "output": "ok"},
    ]
    assert ask(live, history).status_code == 200


def test_incomplete(live):
    """Cut by max_output_tokens: status and reason, in both modes."""
    answer = ask(live, "endless", max_output_tokens=30).json()
    assert answer["status"] == "incomplete"
    assert answer["incomplete_details"] == {"reason": "max_output_tokens"}
    assert events(live, "endless", max_output_tokens=30)[-1]["type"] == "response.incomplete"


def test_a_failure_ends_with_response_failed(live):
    last = events(live, "fail")[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"]["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("previous_response_id", "resp_1"),
        ("store", True),
        ("background", True),
        ("conversation", "c"),
        ("prompt", {"id": "p"}),
        ("truncation", "auto"),
    ],
)
def test_row_59_what_needs_memory_is_refused_by_name(live, field, value):
    answer = ask(live, **{field: value})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


@pytest.mark.parametrize(
    ("value", "param"),
    [
        ([], "input"),
        ([{"type": "function_call_output", "call_id": "x", "output": "y"}], "input[0].tool_call_id"),
        ([{"type": "function_call", "name": "f"}], "input[0].call_id"),
        ([{"type": "item_reference", "id": "x"}], "input[0].type"),
        (
            [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}],
            "input[0].content[0].type",
        ),
        ([{"role": "robot", "content": "x"}], "input[0]"),
    ],
)
def test_input_that_makes_no_sense(live, value, param):
    answer = ask(live, value)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param


def test_what_codex_sends(live):
    """Instructions, a developer message, namespaces of tools, includes and keys that mean nothing here."""
    body = {
        "instructions": "be brief",
        "input": [
            {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "rules"}]},
            {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "hi"}]},
        ],
        "tools": [
            WEATHER,
            {"type": "namespace", "name": "mcp", "tools": [{**WEATHER, "name": "other"}]},
            {"type": "web_search"},
        ],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "stream": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "x",
        "text": {"verbosity": "low"},
        "client_metadata": {"a": "b"},
    }
    answer = live.client.post("/responses", json={"model": "scripted", **body})
    assert answer.status_code == 200, answer.text
    assert answer.json()["output"][-1]["content"][0]["text"] == "Hello!"


def test_structured_text(start):
    """text.format with a schema, on a random model."""
    live = start(ScriptedAnswer(random=True))
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    form = {"format": {"type": "json_schema", "name": "s", "schema": schema, "strict": True}}
    body = {"model": "scripted", "input": "hi", "text": form, "max_output_tokens": 80}
    answer = live.client.post("/v1/responses", json=body)
    assert isinstance(json.loads(answer.json()["output"][0]["content"][0]["text"])["n"], int)
