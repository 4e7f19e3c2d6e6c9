"""Written code, judged by what it returns.

The code runs in the sandbox and is given inputs only. The values that it returns come back by content and are
compared here, so an exit before an assertion, an overridden `__eq__`, a printed mark, a patched module or anything
written to the result pipe earns nothing: to be judged right, the right values must come back.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Sequence
from typing import Any

from rorqual.verify import values
from rorqual.verify.outcome import RIGHT, Outcome, grader_failed, wrong
from rorqual.verify.sandbox import Limits, Result, Sandbox

LIMITS = Limits(seconds=3.0, memory_mb=512, result_kb=1024)
MAX_SOURCE = 64_000  # characters

_lock = threading.Lock()
_shared: dict[int, Sandbox] = {}


def shared() -> Sandbox:
    """The sandbox of this process, started at its first run and ended with the process."""
    with _lock:
        return _shared.setdefault(os.getpid(), Sandbox(LIMITS))


def fenced(completion: str) -> str | None:
    """The last fenced block of a completion, or None where there is none or the last is not closed."""
    marks = list(re.finditer(r"^[ \t]*```([^\n`]*)\r?$", completion, re.MULTILINE))
    if not marks or len(marks) % 2:
        return None
    return completion[marks[-2].end() : marks[-1].start()].strip("\r\n").replace("\r\n", "\n") + "\n"


def source_of(completion: str) -> str:
    """The code of a completion: its last fenced block where it has fences, else all of it."""
    if "```" not in completion:
        return completion.replace("\r\n", "\n")
    return fenced(completion) or ""


def body_of(completion: str) -> str:
    """The part of a completion that goes on with an indented body: up to the first line that is not indented."""
    lines = completion.replace("\r\n", "\n").split("\n")
    end = next(
        (i for i, line in enumerate(lines[1:], 1) if line.strip() and not line[0].isspace()), len(lines)
    )
    return "\n".join(lines[:end]) + "\n"


def grade_calls(
    source: str,
    entry: str,
    calls: Sequence[Sequence[Any]],
    expected: Sequence[Any],
    *,
    tolerance: float = 0.0,
    limits: Limits | None = None,
    sandbox: Sandbox | None = None,
) -> Outcome:
    """Whether `entry` of `source` returns `expected` for `calls` (lists of arguments of built-in types), all of them.

    Floats may differ by `tolerance`. Raises SandboxError where there is no sandbox to be had.
    """
    assert len(calls) == len(expected)
    assert calls
    found = returned(source, entry, calls, limits=limits, sandbox=sandbox)
    if isinstance(found, Outcome):
        return found
    for i, (value, right) in enumerate(zip(found, expected, strict=True)):
        if "value" not in value:
            return wrong(f"call {i}: raised {str(value.get('error'))[:100]}")
        try:
            equal = values.same(values.decode(value["value"]), right, tolerance)
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            return wrong(f"call {i}: no value ({type(e).__name__})")
        if not equal:
            return wrong(f"call {i}: another value")
    return RIGHT


def returned(
    source: str,
    entry: str,
    calls: Sequence[Sequence[Any]],
    *,
    limits: Limits | None = None,
    sandbox: Sandbox | None = None,
) -> list[dict[str, Any]] | Outcome:
    """What the calls gave: for each `{"value": encoded}` or `{"error": name}`; an Outcome where there is less."""
    if len(source) > MAX_SOURCE:
        return wrong(f"source of {len(source)} characters")
    payload = {
        "source": source,
        "entry": entry,
        "calls": [[values.encode(argument) for argument in arguments] for arguments in calls],
    }
    result = (sandbox or shared()).run("rorqual.verify.player:call", payload, limits=limits or LIMITS)
    lines = []
    for line in result.lines[: len(calls) + 1]:
        try:
            lines.append(values.loads(line))
        except (ValueError, RecursionError):
            return wrong("what came back is not a value")
    if not all(isinstance(line, dict) for line in lines):
        return wrong("what came back is not a value")
    if not lines:
        return wrong(_end(result))
    if "load" in lines[0]:
        return wrong(f"does not load: {str(lines[0]['load'])[:100]}")
    if len(lines) < len(calls) + 1:
        return wrong(f"call {len(lines) - 1}: {_end(result)}")
    return lines[1:]


def grade_program(
    source: str,
    cases: Sequence[tuple[str, str]],
    *,
    limits: Limits | None = None,
    sandbox: Sandbox | None = None,
) -> Outcome:
    """Whether a program writes the right output for each (stdin, stdout), white space at line ends left aside."""
    assert cases
    if len(source) > MAX_SOURCE:
        return wrong(f"source of {len(source)} characters")
    for i, (stdin, stdout) in enumerate(cases):
        result = (sandbox or shared()).run(
            "rorqual.verify.player:program", {"source": source}, stdin=stdin, limits=limits or LIMITS
        )
        if result.status != "done":
            return wrong(f"case {i}: {_end(result)}")
        if _lines(result.stdout) != _lines(stdout):
            why = f" ({result.stderr.strip().splitlines()[-1][:200]})" if result.stderr.strip() else ""
            return wrong(f"case {i}: another output{why}")
    return RIGHT


def grade_check(
    source: str,
    entry: str,
    test: str,
    reference: str,
    *,
    limits: Limits | None = None,
    sandbox: Sandbox | None = None,
) -> Outcome:
    """Judge by a trusted `test` that defines `check(candidate)` and may use names of the trusted `reference`.

    The test never meets the code: one run of it on the reference records its inputs, the code is called with
    them in another run, and a third, of trusted code only, checks the values that came back.
    """
    trusted = f"import random\nrandom.seed(0)\n{reference}\n{test}\n"
    recorded = _judge(trusted, entry, None, limits, sandbox)
    if isinstance(recorded, Outcome):
        return recorded
    if not recorded["passed"]:
        return grader_failed(f"the reference fails its own test: {recorded['error']}")
    calls = [[values.decode(a) for a in arguments] for arguments in recorded["calls"]]
    found = returned(source, entry, calls, limits=limits, sandbox=sandbox)
    if isinstance(found, Outcome):
        return found
    verdict = _judge(trusted, entry, found, limits, sandbox)
    if isinstance(verdict, Outcome):
        return verdict
    return RIGHT if verdict["passed"] else wrong(verdict["error"] or "test failed")


def _judge(
    trusted: str,
    entry: str,
    found: list[dict[str, Any]] | None,
    limits: Limits | None,
    sandbox: Sandbox | None,
) -> dict[str, Any] | Outcome:
    payload = {"source": trusted, "reference": entry, "values": found}
    result = (sandbox or shared()).run("rorqual.verify.player:judge", payload, limits=limits or LIMITS)
    if result.status != "done" or len(result.lines) != 1:
        return grader_failed(f"the test itself ended as {result.status}: {result.stderr[-200:]}")
    verdict: dict[str, Any] = json.loads(result.lines[0])
    return verdict


def _lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.replace("\r\n", "\n").strip().split("\n")]


def _end(result: Result) -> str:
    """How a run ended that returned too little."""
    return {
        "done": f"ended with exit code {result.code} before it returned",
        "signal": f"killed by signal {-result.code}",
        "timeout": "timeout",
        "output": "too much output",
        "disk": "too many files",
    }[result.status]
