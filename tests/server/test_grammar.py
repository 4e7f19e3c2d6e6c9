"""Structured output: on a model that draws tokens at random, every finished answer is valid."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from rorqual.server.grammar import Grammar
from rorqual.server.json_schema import json_schema_text
from rorqual.server.phases import Free, PhasedMask, Until
from rorqual.server.scripted import ByteTokenizer, ScriptedAnswer
from rorqual.server.vocabulary import Vocabulary

NODE = {
    "type": "object",
    "properties": {"v": {"type": "integer"}, "kids": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
    "required": ["v"],
    "additionalProperties": False,
}
STRING = {"type": "string"}
SHORT = {"type": "string", "maxLength": 8}


def closed(**properties: Any) -> dict[str, Any]:
    """A strict object: every property required, no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


SCHEMAS: dict[str, dict[str, Any]] = {
    "int": closed(a={"type": "integer"}),
    "text": closed(name=STRING),
    "two": closed(name=SHORT, age={"type": "integer", "minimum": 0, "maximum": 150}),
    "enum": closed(c={"enum": ["red", "green", "blue"]}),
    "enum of kinds": closed(c={"enum": [1, "a", None, True]}),
    "const": closed(c={"const": "fixed"}),
    "bool": closed(b={"type": "boolean"}),
    "null": closed(n={"type": "null"}),
    "number": closed(n={"type": "number"}),
    "bounds": closed(n={"type": "integer", "minimum": -5, "maximum": 5}),
    "exclusive": closed(n={"type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 10}),
    "multiple": closed(n={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 100}),
    "array": closed(l={"type": "array", "items": {"type": "integer"}, "maxItems": 4}),
    "min items": closed(l={"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 3}),
    "tuple": closed(
        t={"type": "array", "prefixItems": [{"type": "integer"}, SHORT], "items": False, "minItems": 2}
    ),
    "nested": closed(a=closed(b=closed(c={"type": "integer"}))),
    "optional": {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": SHORT},
        "required": ["a"],
        "additionalProperties": False,
    },
    "any of": closed(x={"anyOf": [{"type": "integer"}, SHORT, {"type": "null"}]}),
    "nullable": closed(x={"type": ["string", "null"], "maxLength": 5}),
    "one of": closed(x={"oneOf": [closed(k={"const": "a"}), closed(k={"const": "b"})]}),
    "all of": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]},
            {"properties": {"b": {"type": "boolean"}}, "required": ["b"]},
        ]
    },
    "ref": {**closed(c={"$ref": "#/$defs/colour"}), "$defs": {"colour": {"enum": ["x", "y"]}}},
    "definitions": {**closed(c={"$ref": "#/definitions/n"}), "definitions": {"n": {"type": "integer"}}},
    "recursive": {"$ref": "#/$defs/node", "$defs": {"node": NODE}},
    "pattern": closed(p={"type": "string", "pattern": "^[a-z]{2,4}$"}),
    "date": closed(d={"type": "string", "format": "date"}),
    "uuid": closed(u={"type": "string", "format": "uuid"}),
    "email": closed(e={"type": "string", "format": "email"}),
    "ipv4": closed(i={"type": "string", "format": "ipv4"}),
    "lengths": closed(s={"type": "string", "minLength": 3, "maxLength": 5}),
    "map": {"type": "object", "additionalProperties": {"type": "integer"}, "maxProperties": 3},
    "pattern properties": {
        "type": "object",
        "patternProperties": {"^x": {"type": "integer"}},
        "additionalProperties": False,
    },
    "list of objects": closed(
        l={"type": "array", "items": closed(a={"type": "integer"}, b={"type": "boolean"}), "maxItems": 3}
    ),
    "root array": {"type": "array", "items": {"type": "integer"}, "maxItems": 3},
    "root string": {"type": "string", "maxLength": 6},
    "root integer": {"type": "integer", "minimum": 0, "maximum": 999},
    "any object": {"type": "object"},
    "strange names": closed(
        **{'a"b': {"type": "integer"}, "ü 世": {"type": "boolean"}, "": {"type": "null"}}
    ),
    "unicode const": closed(c={"const": 'ü"\\\n世👋'}),
    "wide": closed(**{f"f{i}": {"type": "boolean"} for i in range(20)}),
}


@pytest.fixture(scope="module")
def live(start):
    return start(
        ScriptedAnswer(match="fixed", text="I will not"),
        ScriptedAnswer(random=True),
        script={"max_model_len": 2048},
    )


def structured(live, schema: dict[str, Any], **fields: Any) -> dict[str, Any]:
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema, "strict": True}}
    answer = live.chat(response_format=form, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"]


def check(schema: dict[str, Any], text: str) -> None:
    jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())


def test_there_are_40_schemas():
    """As many as the claim says."""
    assert len(SCHEMAS) == 40


@pytest.mark.parametrize("name", SCHEMAS)
def test_row_43_every_finished_answer_validates(live, name):
    """25 answers of a random model (10 of the widest); what finished is valid. Also row 45: nearly all
    finish, as the end is forced when the tokens run out.
    """
    choices = structured(live, SCHEMAS[name], n=10 if name == "wide" else 25, max_tokens=600, seed=1)
    finished = [c["message"]["content"] for c in choices if c["finish_reason"] == "stop"]
    assert len(finished) >= len(choices) - 1
    for text in finished:
        check(SCHEMAS[name], text)


@pytest.mark.parametrize("name", ["two", "list of objects", "any object", "recursive", "pattern", "wide"])
def test_row_45_finishes_within_four_times_the_shortest(live, name):
    """95% of random answers finish with four times the tokens of the shortest document (bytes are tokens)."""
    shortest = {"two": 20, "list of objects": 7, "any object": 2, "recursive": 7, "pattern": 10, "wide": 220}[
        name
    ]
    choices = structured(live, SCHEMAS[name], n=40, max_tokens=4 * shortest, seed=3)
    finished = [c for c in choices if c["finish_reason"] == "stop"]
    assert len(finished) >= 38
    for choice in finished:
        check(SCHEMAS[name], choice["message"]["content"])


def test_row_42_json_object(live):
    """Always an object, or cut by length."""
    choices = live.chat(response_format={"type": "json_object"}, n=64, max_tokens=200, seed=2).json()[
        "choices"
    ]
    finished = [c["message"]["content"] for c in choices if c["finish_reason"] == "stop"]
    assert len(finished) >= 60
    assert all(isinstance(json.loads(text), dict) for text in finished)


def test_a_model_that_wants_something_else_still_answers_in_json(live):
    """The mask decides, not the model."""
    choice = structured(live, SCHEMAS["enum"], content="fixed")[0]
    check(SCHEMAS["enum"], choice["message"]["content"])


UNSUPPORTED = {
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": {"type": "integer"}},
    "not": {"not": {"type": "integer"}},
    "if": {"if": {"type": "integer"}, "then": {}},
    "propertyNames": {"type": "object", "propertyNames": {"pattern": "^a"}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
}


@pytest.mark.parametrize("keyword", UNSUPPORTED)
def test_row_44_unsupported_keywords_are_named(live, keyword):
    """xgrammar-based peers accept these and break them; here a 400 that names the keyword and its place."""
    schema = closed(deep={"type": "array", "items": UNSUPPORTED[keyword]})
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    error = live.chat(response_format=form).json()["error"]
    assert error["param"] == "response_format"
    assert keyword in error["message"]
    assert "properties.deep.items" in error["message"]


@pytest.mark.parametrize("pattern", ["(", "(?=a)b", "[z-a]", "a{2,1}"])
def test_b072_a_pattern_that_cannot_be_compiled(live, pattern):
    """ggml-org/llama.cpp#19051: 400, never free text under 200."""
    form = {
        "type": "json_schema",
        "json_schema": {"name": "s", "schema": closed(a={"type": "string", "pattern": pattern})},
    }
    answer = live.chat(response_format=form)
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "response_format"


def test_b072_an_escaped_character(live):
    """The pattern ^a\\!$ allows just a!."""
    assert structured(live, {"type": "string", "pattern": r"^a\!$"})[0]["message"]["content"] == '"a!"'


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "foo"},
        {"enum": []},
        {"$ref": "#/nowhere"},
        {"$ref": "http://example.com/x"},
        {"type": "integer", "minimum": 5, "maximum": 3},
        {"type": "string", "format": "zzz"},
        {"properties": 3},
    ],
)
def test_schemas_that_mean_nothing(live, schema):
    """400, and no look-up of foreign references."""
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    answer = live.chat(response_format=form)
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "invalid_schema"


def test_a_number_between_bounds_ends(live):
    """Zeros after the point, of which no number of them may be the end, are not what closes it."""
    schema = closed(a={"type": "number", "exclusiveMinimum": 0})
    choices = structured(live, schema, n=60, seed=0, max_tokens=60)
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    for choice in choices:
        check(schema, choice["message"]["content"])


@pytest.mark.parametrize("depth", [100, 150, 490])
def test_a_schema_may_be_nested_too_deeply(start, depth):
    """llguidance reads 128 levels of JSON."""
    live = start(script={"max_model_len": 2**15})
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "array", "items": schema, "maxItems": 1}
    form = {"type": "json_schema", "json_schema": {"name": "s", "schema": schema}}
    answer = live.chat(response_format=form, max_tokens=2)
    assert answer.status_code == (200 if depth < 128 else 400)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": schema}}}}]
    assert live.chat(tools=tools, max_tokens=2).status_code == 200  # not strict: any object


@pytest.mark.parametrize("name", ["b073 enum ref", "b073 recursive", "b073 no extras"])
def test_b073_references(live, name):
    """ggml-org/llama.cpp#8073: an enum behind $ref, a recursive $ref in items, additionalProperties false."""
    schema = {
        "b073 enum ref": SCHEMAS["ref"],
        "b073 recursive": SCHEMAS["recursive"],
        "b073 no extras": SCHEMAS["two"],
    }[name]
    for choice in structured(live, schema, n=64, max_tokens=300, seed=5):
        if choice["finish_reason"] == "stop":
            check(schema, choice["message"]["content"])


TOOLS = [
    {"type": "function", "function": {"name": "f", "parameters": SCHEMAS["two"]}},
    {"type": "function", "function": {"name": "g", "parameters": SCHEMAS["ref"]}},
]


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "g"}}])
def test_row_46_forced_calls_are_valid(live, choice):
    """pydantic-ai and instructor rely on it; llama-server returned plain text, 3 of 3."""
    schemas = {t["function"]["name"]: t["function"]["parameters"] for t in TOOLS}
    answer = live.chat(tools=TOOLS, tool_choice=choice, n=50, max_tokens=600, seed=4).json()
    whole = 0
    for one in answer["choices"]:
        calls = one["message"].get("tool_calls", [])
        if one["finish_reason"] == "length":
            continue
        whole += 1
        assert one["message"]["content"] is None
        assert calls
        for call in calls:
            check(schemas[call["function"]["name"]], call["function"]["arguments"])
            assert choice == "required" or call["function"]["name"] == "g"
    assert whole >= 48


LIST = closed(v={"type": "boolean"}, next={"type": "array", "items": {"$ref": "#"}, "maxItems": 1})
ROUTE = closed(
    **{"from": closed(city={"type": "string", "maxLength": 4}), "to": {"$ref": "#/properties/from"}}
)


@pytest.mark.parametrize("schema", [ROUTE, LIST], ids=["to a property", "to the root"])
@pytest.mark.parametrize("strict", [True, False])
def test_references_of_a_tool_resolve_in_its_own_schema(live, schema, strict):
    """zod-to-json-schema writes `#/properties/…` for what it has written before."""
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema, "strict": strict}}]
    answer = live.chat(tools=tools, tool_choice="required", n=8, max_tokens=400, seed=3).json()
    calls = [
        c
        for one in answer["choices"]
        if one["finish_reason"] != "length"
        for c in one["message"]["tool_calls"]
    ]
    assert len(calls) >= 6
    for call in calls:
        check(schema, call["function"]["arguments"])
    assert live.chat(tools=tools, max_tokens=5).status_code == 200


def test_an_answer_by_a_schema_or_calls(live):
    """Both on offer: whatever is drawn is one or the other, and valid."""
    schema, parameters = SCHEMAS["bool"], SCHEMAS["enum"]
    tools = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    seen = set()
    for choice in structured(live, schema, tools=tools, n=16, max_tokens=400, seed=1):
        seen.add(choice["finish_reason"])
        for call in choice["message"].get("tool_calls", ()):
            check(parameters, call["function"]["arguments"])
        if choice["finish_reason"] == "stop":
            check(schema, choice["message"]["content"])
    assert {"stop", "tool_calls"} <= seen


def test_b070_the_grammar_begins_after_the_thought(start):
    """vllm-project/vllm#12619: a random model never closes its thought by itself; it is closed in time, the
    thought is not empty and not JSON, the answer is valid.
    """
    live = start(ScriptedAnswer(random=True), script={"thinks": True})
    choices = structured(live, SCHEMAS["int"], n=10, max_tokens=120, seed=6)
    for choice in choices:
        assert choice["finish_reason"] == "stop"
        assert choice["message"]["reasoning_content"]
        check(SCHEMAS["int"], choice["message"]["content"])


# The masks themselves


@pytest.fixture(scope="module")
def vocabulary():
    tokenizer = ByteTokenizer(["</think>", "</think>x", "k>{", "<tool_call>", "><", '"}', "ab"])
    return Vocabulary(tokenizer, tokenizer.vocab_size + 5, tokenizer.special_ids)


def allowed(mask: bytes | None, vocabulary: Vocabulary) -> set[int]:
    return {i for i in range(vocabulary.size) if mask is None or mask[i >> 3] >> (i & 7) & 1}


def test_no_token_runs_past_a_marker(vocabulary):
    """A token that completes the marker and holds more is not allowed; the marker alone is."""
    names = {token: i for i, token in enumerate(vocabulary.tokens)}
    mask = PhasedMask([Until(vocabulary, "</think>"), Free()], 100)
    now = allowed(mask.allowed(), vocabulary)
    assert names[b"</think>x"] not in now
    assert names[b"</think>"] in now
    assert names[b"k>{"] in now
    for byte in b"</thin":
        mask.accept(byte)
    assert names[b"k>{"] not in allowed(mask.allowed(), vocabulary)
    mask.accept(ord("k"))
    mask.accept(ord(">"))
    assert mask.allowed() is None


def test_the_end_is_allowed_only_where_the_grammar_may_end(vocabulary):
    """EOS after a whole document, nothing of the padding ever."""
    grammar = Grammar(vocabulary, json_schema_text({"type": "integer"}, "x"), "x")
    mask = PhasedMask([grammar.phase()], 100)
    assert allowed(mask.allowed(), vocabulary) <= set(b"-0123456789")
    mask.accept(ord("7"))
    now = allowed(mask.allowed(), vocabulary)
    assert now == set(b"0123456789") | {257, ord("."), ord("e"), ord("E")} or now == set(b"0123456789") | {
        257
    }
    assert not mask.finished


def test_a_closed_object_is_finished(vocabulary):
    """Nothing can follow, so the completion ends without another token."""
    grammar = Grammar(vocabulary, json_schema_text(SCHEMAS["const"], "x"), "x")
    mask = PhasedMask([grammar.phase()], 100)
    for byte in b'{"c":"fixed"}':
        assert byte in allowed(mask.allowed(), vocabulary)
        mask.accept(byte)
    assert mask.finished


def test_the_shortest_end_is_forced_when_tokens_run_out(vocabulary):
    """Always the longest choice otherwise: a random walk that would never end still ends in time."""
    schema = closed(l={"type": "array", "items": closed(a=STRING, b=STRING)})
    mask = PhasedMask([Grammar(vocabulary, json_schema_text(schema, "x"), "x").phase()], 120)
    out = bytearray()
    while not mask.finished:
        assert len(out) < 120
        now = allowed(mask.allowed(), vocabulary)
        token = next((i for i in b'a{",:[' if i in now), min(now))
        out += vocabulary.tokens[token]
        mask.accept(token)
        if len(out) > 200:
            break
    check(schema, out.decode())
