"""Whether a mathematical answer equals the right one: exactly for numbers, symbolically for the rest.

`3/4`, `0.75`, `\\frac{3}{4}` and `75%` are equal; `0.33` is not 1/3; a set is equal in any order, a tuple is not. The
model's text is parsed here by a parser of our own (`expression.py`, nothing is evaluated) and only the tree goes
to sympy, in a confined child with a time and memory limit: there are no signals, so it works from any thread.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import threading
from pathlib import Path

from rorqual.errors import ConfigError
from rorqual.verify.answers import extract, last_number
from rorqual.verify.expression import ParseError, Tree, parse, rational
from rorqual.verify.outcome import RIGHT, Outcome, grader_failed, wrong
from rorqual.verify.sandbox import Limits, Sandbox

LIMITS = Limits(seconds=2.0, memory_mb=1024, result_kb=64)
WRAPPED = re.compile(r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
SIZES = re.compile(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[,!;: ]|\\?\$")

_lock = threading.Lock()
_shared: dict[int, Sandbox] = {}


def shared() -> Sandbox:
    """The child server of this process, with sympy imported. Raises ConfigError without sympy."""
    with _lock:
        if os.getpid() not in _shared:
            paths = set()
            for name in ("sympy", "mpmath"):
                spec = importlib.util.find_spec(name)
                if spec is None or spec.origin is None:
                    raise ConfigError(f"verify.maths: needs {name}; pip install 'rorqual[rl]'")
                paths.add(str(Path(spec.origin).parents[1]))
            _shared[os.getpid()] = Sandbox(
                LIMITS, preload=("sympy", "rorqual.verify.algebra"), paths=sorted(paths)
            )
        return _shared[os.getpid()]


def grade(gold: str, completion: str, limits: Limits | None = None) -> Outcome:
    """The verdict on a completion whose marked answer (else last number) must equal `gold`."""
    found = extract(completion)
    if found is None and not re.search(r"boxed|<answer>|^####", completion, re.MULTILINE):
        found = last_number(completion)
    return wrong("no answer") if found is None else equal(gold, found, limits)


def equal(gold: str, answer: str, limits: Limits | None = None) -> Outcome:
    """The verdict on an answer. Where the right one is no expression that can be read, the texts must be equal."""
    try:
        right = parse(gold)
    except ParseError:
        return _as_text(gold, answer)
    try:
        given = parse(answer)
    except ParseError as e:
        return wrong(f"not an expression: {e}")
    if right == given:
        return RIGHT
    a, b = rational(right), rational(given)
    if a is not None and b is not None:
        return RIGHT if a == b else wrong(f"{answer[:80]}, not {gold[:80]}")
    outcome = _symbolic(right, given, limits or LIMITS)
    return _as_text(gold, answer) if outcome is None else outcome


def _as_text(gold: str, answer: str) -> Outcome:
    return RIGHT if plain(gold) == plain(answer) else wrong(f"{answer[:80]}, not the text {gold[:80]}")


def plain(text: str) -> str:
    """A text without what makes no difference to a reader: spaces, sizes, fonts, brackets around a letter of a choice."""
    text = WRAPPED.sub(r"\1", SIZES.sub("", text)).strip().removesuffix(".")
    for name, same in (("le", "leq"), ("ge", "geq"), ("ne", "neq"), ("dfrac", "frac"), ("tfrac", "frac")):
        text = re.sub(rf"\\{name}(?![A-Za-z])", rf"\\{same}", text)
    for sign, name in (("≤", "leq"), ("≥", "geq"), ("≠", "neq")):
        text = text.replace(sign, rf"\{name} ")
    text = "".join(text.split())
    return re.sub(r"^\(([A-Z])\)$", r"\1", text)


def _symbolic(gold: Tree, answer: Tree, limits: Limits) -> Outcome | None:
    """The verdict of sympy; None where the right answer has no value, such as an equation of lists."""
    payload = {"gold": gold, "answer": answer}
    result = shared().run("rorqual.verify.algebra:decide", payload, limits=limits)
    stages = [line for line in result.lines if line in ("gold", "answer")]
    if "gold" not in stages and result.lines and result.status == "done":
        return None
    if "gold" not in stages:
        return grader_failed(f"the right answer itself: {result.status} {' '.join(result.lines)[:200]}")
    end = json.loads(result.lines[-1]) if result.lines[-1].startswith("{") else {}
    if "equal" in end:
        return RIGHT if end["equal"] else wrong("another value")
    return wrong(
        end.get("error")
        or {"done": "ended early", "signal": "out of memory"}.get(result.status, result.status)
    )
