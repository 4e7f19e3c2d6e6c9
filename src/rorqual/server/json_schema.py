"""JSON Schema as a grammar of llguidance, or a refusal that names the keyword that cannot be kept and its place."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from llguidance import LLMatcher

from rorqual.server.faults import invalid

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions


def json_schema_text(schema: dict[str, Any], param: str) -> str:
    """The grammar of a JSON Schema; a 400 that names the keyword and its place where it cannot be kept."""
    field = param.split(".", 1)[0].split("[", 1)[0]
    try:
        text = _schema_grammar(schema)
    except (ValueError, RecursionError) as e:  # nested more deeply than the grammar's reader goes
        raise invalid(f"{param}: {e}; nest it less deeply", field, "invalid_schema") from None
    error = _fault(text)
    if error:
        where, cause = _blame(schema, "", schema, error)
        place = f"{param}{where}" if where else param
        raise invalid(f"{place}: {cause}", field, "invalid_schema")
    return text


def inline_schema(schema: dict[str, Any]) -> str:
    """A schema as a `%json` term of a Lark grammar."""
    return "%json " + json.dumps({**schema, "x-guidance": _OPTIONS})


def supported(schema: dict[str, Any]) -> bool:
    """Whether the grammar can keep all of `schema`."""
    try:
        return not _fault(_schema_grammar(schema))
    except (ValueError, RecursionError):
        return False


# At most one blank after a comma or a colon, none elsewhere: no room for an endless run of white space.
_OPTIONS: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}


def _schema_grammar(schema: dict[str, Any]) -> str:
    text: str = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_OPTIONS)
    return text


def _fault(grammar: str) -> str:
    message: str = LLMatcher.validate_grammar(grammar)
    return "" if message.startswith("WARNING") else message


_NESTED = ("properties", "patternProperties", "$defs", "definitions")
_LISTED = ("anyOf", "allOf", "oneOf", "prefixItems")
_SINGLE = ("items", "additionalProperties")


def _blame(schema: Any, where: str, root: dict[str, Any], error: str) -> tuple[str, str]:
    """The deepest part of a schema that fails on its own, and why."""
    for place, part in _parts(schema):
        shared: dict[str, Any] = {k: root[k] for k in ("$defs", "definitions") if k in root}
        cause = _fault(_schema_grammar({**shared, **part})) if part is not root else ""
        if cause and "does not exist" not in cause:
            return _blame(part, where + place, root, cause)
    return where, first_line(error)


def _parts(schema: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if not isinstance(schema, dict):
        return
    for key in _NESTED:
        for name, part in _items(schema.get(key)):
            yield f".{key}.{name}", part
    for key in _LISTED:
        for i, part in enumerate(schema[key] if isinstance(schema.get(key), list) else []):
            if isinstance(part, dict):
                yield f".{key}[{i}]", part
    for key in _SINGLE:
        if isinstance(schema.get(key), dict):
            yield f".{key}", schema[key]


def _items(value: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, dict):
        yield from ((name, part) for name, part in value.items() if isinstance(part, dict))


def first_line(message: str) -> str:
    """llguidance's message without the state that it prints after it."""
    return " ".join(message.split("<state>")[0].split())[:500]
