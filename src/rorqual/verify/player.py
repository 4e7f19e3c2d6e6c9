"""What runs inside the sandbox: untrusted code called with given inputs, or run as a program.

Runs in the confined child only. It is given inputs, never expected values, so nothing in its memory helps a
cheat; and whatever the code does to this module, to json or to the result pipe can only change which values are
returned, which the other side compares with what it knows.
"""

from __future__ import annotations

import io
import json
import linecache
import sys
import types
from collections.abc import Callable
from typing import Any

from rorqual.verify.values import decode, encode


def call(payload: dict[str, Any], emit: Callable[[str], None]) -> None:
    """Call `entry` of `source` with each of `calls` (encoded argument lists); emit one line each."""
    dumps, read, write_value = json.dumps, decode, encode
    calls = [read(arguments) for arguments in payload["calls"]]
    try:
        space = _module("solution", payload["source"])
        function = space[payload["entry"]]
    except BaseException as e:
        emit(dumps({"load": _name(e)}))
        return
    emit(dumps({"loaded": True}))
    for arguments in calls:
        try:
            line = dumps({"value": write_value(function(*arguments))})
        except BaseException as e:
            line = dumps({"error": _name(e)})
        emit(line)


def program(payload: dict[str, Any], emit: Callable[[str], None]) -> None:
    """Run `source` as `__main__`; its output goes to the run's stdout and stderr, its exit code is emitted."""
    code = 0
    try:
        _module("__main__", payload["source"])
    except SystemExit as e:
        if e.code is not None and not isinstance(e.code, int):
            print(e.code, file=sys.stderr)
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:
            code = code or 1
    emit(json.dumps({"exit": code}))


def judge(payload: dict[str, Any], emit: Callable[[str], None]) -> None:
    """Trusted code only: run `check` of `source` on a candidate that records the arguments of its calls and answers
    with `values` (encoded) in turn, or, where there are none, with what `reference` of the source returns."""
    space = _module("judge", payload["source"])
    values = payload["values"]
    calls: list[Any] = []

    def candidate(*arguments: Any) -> Any:
        calls.append([encode(a) for a in arguments])
        if values is None:
            return space[payload["reference"]](*arguments)
        value = values[len(calls) - 1]
        if "value" not in value:
            raise RuntimeError(value.get("error", "no value"))
        return decode(value["value"])

    passed, error = True, ""
    try:
        space["check"](candidate)
    except Exception as e:
        passed, error = False, f"{type(e).__name__}: {e}"[:200]
    emit(json.dumps({"passed": passed, "error": error, "calls": calls}))


def _module(name: str, source: str) -> dict[str, Any]:
    module = types.ModuleType(name)
    sys.modules[name] = module
    file = f"<{name}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)), encoding="utf-8")
    exec(compile(source, file, "exec"), module.__dict__)
    return module.__dict__


def _name(e: BaseException) -> str:
    """The type of an exception, which may lie in its message but not in its type's name."""
    return str(type.__getattribute__(type(e), "__name__"))[:100]
