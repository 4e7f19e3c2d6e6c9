"""Tool calls written, parsed at every cut, and streamed, in the Hermes and the DeepSeek forms."""

from __future__ import annotations

import json
import random

import pytest

from rorqual.server.events import CallArguments, CallStart, Text
from rorqual.server.scripted import ScriptedAnswer
from rorqual.server.tool_parser import ToolSplitter
from rorqual.server.tools import HERMES, DeepSeek, ToolSpec, format_of
from rorqual.text.template import DEEPSEEK_V3, ChatTemplate

FORMS = {"hermes": HERMES, "deepseek": DeepSeek(fenced=True), "deepseek bare": DeepSeek(fenced=False)}
ARGUMENTS = '{"files":[{"path":"a","content":"x\\"y</tool_call>"}]}'


def write(form, name: str, arguments: str) -> str:
    """One region with one call, as a model writes it."""
    if form is HERMES:
        return form.write(name, arguments)
    if form.fenced:
        call = f"{form.call_begin}function{form.separator}{name}\n```json\n{arguments}\n```{form.call_end}"
    else:
        call = f"{form.call_begin}{name}{form.separator}{arguments}{form.call_end}"
    return form.begin + call + form.end


def parse(form, pieces: list[str]) -> tuple[str, list[tuple[str, str]], int]:
    """Text, calls (name, arguments), and how many of them are whole."""
    splitter = ToolSplitter(form)
    events = [e for piece in pieces for e in splitter.feed(piece)] + splitter.finish()
    calls: list[list[str]] = []
    for event in events:
        if isinstance(event, CallStart):
            assert event.index == len(calls)
            calls.append([event.name, ""])
        elif isinstance(event, CallArguments):
            calls[event.index][1] += event.text
    text = "".join(e.text for e in events if isinstance(e, Text))
    return text, [(name, arguments) for name, arguments in calls], splitter.complete


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_b064_every_cut(form):
    """sgl-project/sglang#39632: split at every position, and character by character, nothing vanishes."""
    output = f"Let me look.\n{write(form, 'edit', ARGUMENTS)}"
    want = ("Let me look.", [("edit", ARGUMENTS)], 1)
    assert parse(form, list(output)) == want
    for cut in range(len(output)):
        assert parse(form, [output[:cut], output[cut:]]) == want


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_row_47_several_calls(form):
    """Calls in one region or several, numbered from 0."""
    both = write(form, "f", '{"a": 1}') + "\n" + write(form, "g", "{}")
    if form is not HERMES:
        inner = (
            write(form, "f", '{"a": 1}').removesuffix(form.end)
            + "\n"
            + write(form, "g", "{}").removeprefix(form.begin)
        )
        assert parse(form, list(inner)) == ("", [("f", '{"a": 1}'), ("g", "{}")], 2)
    assert parse(form, list(both)) == ("", [("f", '{"a": 1}'), ("g", "{}")], 2)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("arguments", ['{"a": nope}', '{"a": "x" "y"}', "{,}"])
def test_b064_malformed_calls_fail_closed(form, arguments):
    """No markup becomes text, what follows is still text, and the call does not count."""
    output = f"a {write(form, 'f', arguments)} b"
    text, _, complete = parse(form, list(output))
    assert complete == 0
    assert text.split() == ["a", "b"]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_call_that_is_cut_off(form):
    """max_tokens within the arguments: what is there is passed on, and the call is not whole."""
    output = write(form, "f", '{"city": "Par')
    text, calls, complete = parse(form, list(output[: output.index("Par") + 3]))
    assert (text, calls, complete) == ("", [("f", '{"city": "Par')], 0)


def test_hermes_body_in_another_order():
    """Arguments before the name, arguments as text, and `parameters`, as models have written them."""
    for body in (
        '{"arguments": {"a": 1}, "name": "f"}',
        '{"name": "f", "arguments": "{\\"a\\": 1}"}',
        '{"name": "f", "parameters": {"a": 1}}',
    ):
        text, calls, complete = parse(HERMES, list(f"<tool_call>{body}</tool_call>"))
        assert (text, [(n, json.loads(a)) for n, a in calls], complete) == ("", [("f", {"a": 1})], 1)


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_text_that_only_begins_like_a_call_is_kept(form):
    """What was held back for a marker comes out when it is none."""
    for text in (f"a {form.begin[:-1]}", "1 < 2 <t ", f"{form.begin[0] * 3} x", "  lead", "end  \n"):
        assert parse(form, list(text))[0] == text


@pytest.mark.parametrize("source", ["hermes", DEEPSEEK_V3], ids=["hermes", "deepseek-v3"])
def test_b066_what_the_template_writes_the_parser_reads(source):
    """sgl-project/sglang#17141: 20 random calls through the prompt's form and back."""
    rng = random.Random(0)
    for _ in range(20):
        name = "".join(rng.choices("abcdefg_", k=5))
        value = "".join(rng.choices('aü世"\\\n{}</> ', k=12))
        arguments = {"text": value, "list": [rng.random(), {"k": None}]}
        form, _ = format_of("" if source == "hermes" else source)
        call = {"id": "1", "type": "function", "function": form.history(name, json.dumps(arguments))}
        message = {"role": "assistant", "content": "", "tool_calls": [call]}
        if source == "hermes":
            plain = {**call, "function": {"name": name, "arguments": json.dumps(arguments)}}
            rendered = form.describe([{**message, "tool_calls": [plain]}], [])[0]["content"]
        else:
            rendered = ChatTemplate(source).render(
                [{"role": "user", "content": "q"}, message], add_generation_prompt=False
            )
        _, calls, complete = parse(form, [rendered])
        assert complete == 1
        assert (calls[0][0], json.loads(calls[0][1])) == (name, arguments)


def test_the_form_is_read_off_the_template():
    """DeepSeek's markers, fenced or bare, else Hermes; tools are described by us where the template has none."""
    assert isinstance(format_of(DEEPSEEK_V3)[0], DeepSeek)
    assert format_of(DEEPSEEK_V3)[0].fenced
    assert not format_of(DEEPSEEK_V3.replace("```json", ""))[0].fenced
    assert format_of("{% if tools %}<tool_call>{% endif %}") == (HERMES, True)
    assert format_of("{{ messages }}") == (HERMES, False)


# Through the API

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "parameters": {
                "type": "object",
                "properties": {"city": {"type": "string"}},
                "required": ["city"],
            },
        },
    },
    {"type": "function", "function": {"name": "time", "parameters": {"type": "object", "properties": {}}}},
]
CALL = HERMES.write("weather", '{"city": "Lüttich 👋"}')
TWO = CALL + "\n" + HERMES.write("time", "{}")


@pytest.fixture(scope="module")
def live(start):
    answers = (
        ScriptedAnswer(match="one call", text=f"I will look.\n{CALL}"),
        ScriptedAnswer(match="two calls", text=TWO),
        ScriptedAnswer(match="no call", text="It is sunny."),
        ScriptedAnswer(text=CALL),
    )
    return start(*answers)


def streamed(live, content: str, **fields):
    body = {"model": "scripted", "messages": [{"role": "user", "content": content}], "tools": TOOLS, **fields}
    frames = live.frames("/v1/chat/completions", body)[:-1]
    choices = [json.loads(f.removeprefix(b"data: "))["choices"][0] for f in frames]
    calls: dict[int, dict[str, str]] = {}
    for choice in choices:
        for call in choice["delta"].get("tool_calls", []):
            entry = calls.setdefault(call["index"], {"name": "", "arguments": ""})
            entry["name"] += call["function"].get("name", "")
            entry["arguments"] += call["function"]["arguments"]
            if call.get("id"):
                assert "id" not in entry, "an id, and with it the name, comes once"
                entry["id"] = call["id"]
    text = "".join(c["delta"].get("content", "") for c in choices)
    return text, [calls[i] for i in sorted(calls)], choices[-1]["finish_reason"]


@pytest.mark.parametrize(
    ("choice", "reason"),
    [
        ("auto", "tool_calls"),
        ("required", "tool_calls"),
        ({"type": "function", "function": {"name": "weather"}}, "stop"),
    ],
)
def test_b063_row_48_finish_reason_and_arguments_are_the_same_streamed_or_whole(live, choice, reason):
    """vllm-project/vllm#25054: auto and required finish with tool_calls, named with stop, in both modes."""
    whole = live.chat("a call", tools=TOOLS, tool_choice=choice).json()["choices"][0]
    text, calls, finish = streamed(live, "a call", tool_choice=choice)
    assert finish == whole["finish_reason"] == reason
    assert whole["message"]["content"] is None
    assert text == ""
    function = whole["message"]["tool_calls"][0]["function"]
    assert {"name": calls[0]["name"], "arguments": calls[0]["arguments"]} == function
    assert json.loads(function["arguments"]) == {"city": "Lüttich 👋"}


def test_text_before_a_call_is_content(live):
    """The text and the call, without the white space between them."""
    message = live.chat("one call", tools=TOOLS).json()["choices"][0]["message"]
    assert message["content"] == "I will look."
    assert [c["function"]["name"] for c in message["tool_calls"]] == ["weather"]


def test_row_47_parallel_calls(live):
    """Two calls with ids of their own; with parallel_tool_calls: false one."""
    calls = live.chat("two calls", tools=TOOLS).json()["choices"][0]["message"]["tool_calls"]
    assert [c["function"]["name"] for c in calls] == ["weather", "time"]
    assert len({c["id"] for c in calls}) == 2
    one = live.chat("two calls", tools=TOOLS, parallel_tool_calls=False).json()["choices"][0]
    assert [c["function"]["name"] for c in one["message"]["tool_calls"]] == ["weather"]
    assert one["finish_reason"] == "tool_calls"
    assert len(streamed(live, "two calls", parallel_tool_calls=False)[1]) == 1


def test_with_a_response_format_a_call_is_still_a_call(live):
    """Tools stay on offer beside it."""
    choice = live.chat("a call", tools=TOOLS, response_format={"type": "json_object"}).json()["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["tool_calls"][0]["function"]["name"] == "weather"


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_document_may_quote_a_call(form):
    """It is whole at every cut; a call at the beginning is one."""
    quoted = f' {{"a": "{form.begin} x", "b": 1}}'
    call = write(form, "f", "{}")
    for pieces in ([quoted], list(quoted), [quoted[:8], quoted[8:]]):
        splitter = ToolSplitter(form, document=True)
        events = [e for piece in pieces for e in splitter.feed(piece)] + splitter.finish()
        assert "".join(e.text for e in events if isinstance(e, Text)) == quoted
    splitter = ToolSplitter(form, document=True)
    assert [e.name for piece in f"\n{call}" for e in splitter.feed(piece) if isinstance(e, CallStart)] == [
        "f"
    ]


def test_a_json_answer_that_quotes_a_call_is_whole(start):
    """With tools on offer too."""
    text = json.dumps({"a": f"{CALL} is a call"}, ensure_ascii=False)
    live = start(ScriptedAnswer(text=text))
    choice = live.chat("q", tools=TOOLS, response_format={"type": "json_object"}).json()["choices"][0]
    assert (choice["message"], choice["finish_reason"]) == ({"role": "assistant", "content": text}, "stop")


def test_tool_choice_none_leaves_markup_alone(live):
    """No tools are offered, so nothing is parsed."""
    choice = live.chat("a call", tools=TOOLS, tool_choice="none").json()["choices"][0]
    assert choice["message"]["content"] == CALL
    assert choice["finish_reason"] == "stop"


def test_without_a_call_the_answer_is_text(live):
    """Tools on offer change nothing then."""
    choice = live.chat("no call", tools=TOOLS).json()["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": "It is sunny."}
    assert choice["finish_reason"] == "stop"


@pytest.mark.parametrize("thought", [None, "", "I wonder"])
def test_rows_49_52_b069_a_round_trip(live, thought):
    """vercel/ai#14740: calls and results go back in, with or without the thought, which is kept as tools are
    in play. The prompt is exactly this text.
    """
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
    said = [
        {"role": "user", "content": "q"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [call],
            "reasoning_content": thought,
            "unknown": 1,
        },
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    ids = live.client.post("/tokenize", json={"messages": said}).json()["tokens"]
    prompt = live.client.post("/detokenize", json={"tokens": ids}).json()["prompt"]
    assert prompt == (
        "<bos><|user|>q<eos>\n<|assistant|>"
        + ("<think>I wonder</think>" if thought else "")
        + '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call><eos>\n'
        "<|user|><tool_response>\nsunny\n</tool_response><eos>\n<|assistant|>"
    )
    assert (
        live.client.post("/v1/chat/completions", json={"model": "scripted", "messages": said}).status_code
        == 200
    )


def test_row_52_without_tools_an_earlier_thought_is_left_out(live):
    """DeepSeek ignores it there."""
    said = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "a", "reasoning_content": "secret"},
        {"role": "user", "content": "r"},
    ]
    ids = live.client.post("/tokenize", json={"messages": said}).json()["tokens"]
    assert "secret" not in live.client.post("/detokenize", json={"tokens": ids}).json()["prompt"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "no"}}},
            "tool_choice.function.name",
        ),
        ({"tools": [TOOLS[0]] * 129}, "tools"),
        ({"tools": [{"type": "function", "function": {"name": ""}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        (
            {"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}},
            "response_format",
        ),
    ],
)
def test_tools_that_make_no_sense(live, fields, param):
    """400 naming the field."""
    error = live.chat(**fields)
    assert error.status_code == 400
    assert error.json()["error"]["param"] == param


def test_a_strict_tool_with_a_keyword_that_cannot_be_kept(live):
    """Strict is a promise: refused by name. Not strict, the arguments are any object."""
    schema = {"type": "object", "properties": {"a": {"type": "array", "uniqueItems": True}}}
    function = {"name": "f", "parameters": schema, "strict": True}
    error = live.chat(tools=[{"type": "function", "function": function}]).json()["error"]
    assert "uniqueItems" in error["message"]
    assert error["param"] == "tools"
    assert (
        live.chat(tools=[{"type": "function", "function": {**function, "strict": False}}]).status_code == 200
    )


def test_tool_spec_schema_is_always_an_object():
    """A tool without parameters takes none in particular."""
    assert ToolSpec("f").schema() == {"type": "object"}
    assert ToolSpec("f", parameters={"properties": {}}).schema()["type"] == "object"
