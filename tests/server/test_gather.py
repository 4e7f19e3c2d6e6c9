"""Tokens that leave together where many requests run: none lost, none late, the first and the last at once."""

from __future__ import annotations

from rorqual.engine.request import Delta
from rorqual.server.bridge import Bridge
from rorqual.server.scripted import Script, ScriptedAnswer, ScriptedEngine

Left = list[tuple[str, list[int], str]]


def delta(name: str, token: int, end: bool = False) -> Delta:
    return Delta(name, [token], f"{token} ", finish_reason="length" if end else None)


def bridge() -> Bridge:
    engine = ScriptedEngine(Script(answers=(ScriptedAnswer(text="x"),)))
    return Bridge(engine, gather_from=2, gather_s=0.2)


def left(b: Bridge, now: float, *deltas: Delta) -> Left:
    return [(d.request_id, d.token_ids, d.text) for d in b._gathered(list(deltas), now)]


def test_first_then_together_then_whatever_is_left() -> None:
    b = bridge()
    assert left(b, 0.0, delta("a", 1), delta("b", 11)) == [("a", [1], "1 "), ("b", [11], "11 ")]
    assert left(b, 0.1, delta("a", 2), delta("b", 12)) == []
    assert left(b, 0.15, delta("a", 3), delta("b", 13)) == []
    assert left(b, 0.21, delta("a", 4), delta("b", 14)) == [
        ("a", [2, 3, 4], "2 3 4 "),
        ("b", [12, 13, 14], "12 13 14 "),
    ]
    assert left(b, 0.3, delta("a", 5), delta("b", 15)) == []
    assert left(b, 0.35, delta("a", 6, end=True), delta("b", 16)) == [("a", [5, 6], "5 6 ")]
    assert left(b, 0.36, delta("b", 17)) == [("b", [15, 16, 17], "15 16 17 ")]  # alone: at once
    assert not b._held
    assert b._sent == {"b": 0.36}


def test_a_token_does_not_wait_for_a_request_that_pauses() -> None:
    b = bridge()
    left(b, 0.0, delta("a", 1), delta("b", 11), delta("c", 21))
    assert left(b, 0.1, delta("a", 2), delta("b", 12), delta("c", 22)) == []
    assert left(b, 0.15, delta("a", 3), delta("b", 13)) == [("c", [22], "22 ")]


def test_what_is_cancelled_is_forgotten() -> None:
    b = bridge()
    left(b, 0.0, delta("a", 1), delta("b", 11))
    left(b, 0.1, delta("a", 2), delta("b", 12))
    b._abort(["a"])
    assert left(b, 0.15, delta("b", 13)) == [("b", [12, 13], "12 13 ")]
    assert b._sent == {"b": 0.15}
