"""Tokens that leave two by two where many requests run: none lost, none late, the first and the last at once."""

from __future__ import annotations

from rorqual.engine.request import Delta
from rorqual.server.bridge import Bridge
from rorqual.server.scripted import Script, ScriptedAnswer, ScriptedEngine


def delta(name: str, token: int, end: bool = False) -> Delta:
    return Delta(name, [token], f"{token} ", finish_reason="length" if end else None)


def bridge() -> Bridge:
    return Bridge(ScriptedEngine(Script(answers=(ScriptedAnswer(text="x"),))), pairs_from=2)


def left(b: Bridge, *deltas: Delta) -> list[tuple[str, list[int], str]]:
    return [(d.request_id, d.token_ids, d.text) for d in b._paired(list(deltas))]


def test_first_then_pairs_then_whatever_is_left() -> None:
    b = bridge()
    assert left(b, delta("a", 1), delta("b", 11)) == [("a", [1], "1 "), ("b", [11], "11 ")]
    assert left(b, delta("a", 2), delta("b", 12)) == []
    assert left(b, delta("a", 3), delta("b", 13)) == [("a", [2, 3], "2 3 "), ("b", [12, 13], "12 13 ")]
    assert left(b, delta("a", 4), delta("b", 14)) == []
    assert left(b, delta("a", 5, end=True), delta("b", 15)) == [
        ("a", [4, 5], "4 5 "),
        ("b", [14, 15], "14 15 "),
    ]
    assert left(b, delta("b", 16)) == [("b", [16], "16 ")]  # alone: at once
    assert not b._held
    assert b._begun == {"b"}


def test_a_token_does_not_wait_for_a_request_that_pauses() -> None:
    b = bridge()
    left(b, delta("a", 1), delta("b", 11), delta("c", 21))
    assert left(b, delta("a", 2), delta("b", 12), delta("c", 22)) == []
    assert left(b, delta("a", 3), delta("b", 13)) == [
        ("c", [22], "22 "), ("a", [2, 3], "2 3 "), ("b", [12, 13], "12 13 "),
    ]  # fmt: skip


def test_what_is_cancelled_is_forgotten() -> None:
    b = bridge()
    left(b, delta("a", 1), delta("b", 11))
    left(b, delta("a", 2), delta("b", 12))
    b._abort(["a"])
    assert left(b, delta("b", 13)) == [("b", [12, 13], "12 13 ")]
    assert b._begun == {"b"}
