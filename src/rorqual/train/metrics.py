"""metrics.jsonl is the truth of a run: one line a logged step. The live view and the report read the same figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, TextIO

FILE = "metrics.jsonl"


class View(Protocol):
    """Something that shows a run to a person."""

    def update(self, line: Mapping[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


class NoView:
    """Shows nothing."""

    def update(self, line: Mapping[str, Any]) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


class Log:
    """Appends lines; on a resumed run first drops those after the checkpoint, which will be computed again."""

    def __init__(self, run: Path, step: int) -> None:
        self.path = run / FILE
        self._file = self._from(step)

    def write(self, line: Mapping[str, Any]) -> None:
        """Append a line."""
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Drop what is later than a step."""
        self._file.close()
        self._file = self._from(step)

    def __enter__(self) -> Log:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _from(self, step: int) -> TextIO:
        kept = [line for line in read(self.path.parent) if line["step"] <= step]
        work = self.path.with_suffix(".partial")
        work.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        work.replace(self.path)
        return self.path.open("a", encoding="utf-8")


class NoLog(Log):
    """Of a process that does not speak for the run."""

    def __init__(self) -> None: ...

    def write(self, line: Mapping[str, Any]) -> None: ...

    def rewind(self, step: int) -> None: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def read(run: Path) -> list[dict[str, Any]]:
    """The lines of a run, a half-written last one left out."""
    path = run / FILE
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            lines.append(json.loads(text))
        except ValueError:
            break
    return lines
