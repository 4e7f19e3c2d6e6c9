"""Runs in a child that can be killed: builds expressions in sympy from parsed trees and decides whether they are equal.

Two expressions are equal where their difference is zero, or vanishes at four points, a negative one among them: of what
is left when terms cancel, 100 digits hold none that is sure. So e^{-100}, which is small but cancels nothing, is not 0.
It says how far it came, so that the other side knows whose expression it was that took too long.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import sympy

POINTS = ("0.7310585786", "1.9073486328", "-0.6180339887", "3.3019272488")
DIGITS = 50


def decide(payload: dict[str, Any], emit: Callable[[str], None]) -> None:
    """Emit `gold`, then `answer`, as each is built, then `{"equal": …}`; or `{"error": …}`."""
    try:
        gold = build(payload["gold"])
        emit("gold")
        answer = build(payload["answer"])
        emit("answer")
        emit(json.dumps({"equal": bool(same(gold, answer))}))
    except Exception as e:
        emit(json.dumps({"error": f"{type(e).__name__}: {e}"[:200]}))


def build(tree: list[Any]) -> Any:
    """A sympy expression, or for groups ("group", brackets, items), for equations ("=", difference)."""
    kind = tree[0]
    if kind == "num":
        return sympy.Rational(tree[1])
    if kind == "var":
        return sympy.Symbol(tree[1])
    if kind == "const":
        return {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}[tree[1]]
    if kind == "group":
        return ("group", tree[1] + tree[2], [build(item) for item in tree[3]])
    if kind == "=":
        return ("=", build(tree[1]) - build(tree[2]))
    if kind == "call":
        name = {"ln": "log", "arcsin": "asin", "arccos": "acos", "arctan": "atan", "abs": "Abs"}.get(
            tree[1], tree[1]
        )
        return getattr(sympy, name)(build(tree[2]))
    if kind in ("neg", "!"):
        inner = build(tree[1])
        return -inner if kind == "neg" else sympy.factorial(inner)
    a, b = build(tree[1]), build(tree[2])
    return {
        "+": lambda: a + b,
        "-": lambda: a - b,
        "*": lambda: a * b,
        "/": lambda: a / b,
        "^": lambda: a**b,
    }[kind]()


def same(a: Any, b: Any) -> bool:
    """Equality of two results of `build`."""
    if isinstance(a, tuple) != isinstance(b, tuple):
        return False
    if isinstance(a, tuple):
        if a[0] != b[0]:
            return False
        if a[0] == "=":
            return same(a[1], b[1]) or same(a[1], -b[1])
        if a[1] != b[1] or len(a[2]) != len(b[2]):
            return False
        if a[1] != "{}":
            return all(map(same, a[2], b[2]))
        rest = list(b[2])
        for item in a[2]:
            match = next((i for i, other in enumerate(rest) if same(item, other)), None)
            if match is None:
                return False
            rest.pop(match)
        return True
    if a == b:
        return True
    if a.has(sympy.oo, sympy.zoo, sympy.nan) or b.has(sympy.oo, sympy.zoo, sympy.nan):
        return False
    if a.free_symbols != b.free_symbols and sympy.simplify(a - b) != 0:
        return False
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    for shift in range(len(POINTS) if symbols else 1):
        where = {s: sympy.Rational(POINTS[(i + shift) % len(POINTS)]) for i, s in enumerate(symbols)}
        value = (a - b).subs(where).evalf(DIGITS)
        if not value.is_number or not all(map(_vanishes, value.as_real_imag())):
            return False
    return True


def _vanishes(part: Any) -> bool:
    """Whether a number is zero as far as sympy could say, which gives what has no sure digit a precision of one bit."""
    return bool(part == 0) or (isinstance(part, sympy.Float) and part._prec == 1)
