"""The scanner against Python's own JSON reader."""

from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rorqual.server.json_scanner import JsonScanner

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(st.text(max_size=4), values, max_size=4),
    st.booleans(),
    st.integers(1, 7),
    st.text(max_size=5),
)
def test_finds_the_end_of_any_object_at_any_cut(value, pretty, step, after):
    """Fed in pieces, it takes exactly the object's characters."""
    text = json.dumps(value, indent=1 if pretty else None, ensure_ascii=not pretty)
    scanner, used = JsonScanner(), 0
    whole = text + after
    for at in range(0, len(whole), step):
        used += scanner.feed(whole[at : at + step])
        if scanner.done or scanner.bad:
            break
    assert scanner.done
    assert used == len(text)


@pytest.mark.parametrize(
    "text",
    [
        '{"a" 1}',
        "{a: 1}",
        '{"a": nope }',
        '{"a": 01 }',
        '{"a": 1,}',
        "[1,]",
        '["\\x"]',
        '["a\n"]',
        '{"a": 1]',
        "[}",
        "{,}",
        '["\\u12g4"]',
        "[1 2]",
        '{"a"}',
    ],
)
def test_refuses_what_json_refuses(text):
    """Every one of these is refused by json.loads too."""
    with pytest.raises(ValueError):
        json.loads(text)
    scanner = JsonScanner()
    scanner.feed(text)
    assert scanner.bad
    assert not scanner.done
