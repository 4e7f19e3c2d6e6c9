"""What a back-end starts, and what is left when it has ended: files in the trial's folder, the same for all back-ends."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from rorqual.checkpoint.files import write_whole
from rorqual.lab.contract import METRICS

LOG, CURRENT, LOCK, RUN = "log.txt", "current", "lock", "run"


@dataclass(frozen=True)
class Job:
    """An attempt to bring a trial to `budget` steps. `token` is unlike that of any other attempt of any lab."""

    token: str
    attempt: int
    folder: str
    budget: int
    rungs: tuple[int, ...]
    metric: str
    kind: str
    spec: dict[str, Any]
    settings: dict[str, Any]
    name: str
    threads: int
    memory_mb: int

    def write(self) -> None:
        """Put it where the child finds it; from now on, earlier attempts do nothing more. Raises CheckpointError."""
        folder = Path(self.folder)
        (folder / RUN).mkdir(parents=True, exist_ok=True)
        write_whole(folder / f"job-{self.attempt}.json", json.dumps(asdict(self)) + "\n")
        write_whole(folder / CURRENT, f"{self.attempt}\n")

    @classmethod
    def read(cls, folder: Path, attempt: int) -> Job:
        tree = json.loads((folder / f"job-{attempt}.json").read_text(encoding="utf-8"))
        return cls(**{**tree, "rungs": tuple(tree["rungs"])})


@dataclass(frozen=True)
class Outcome:
    """How an attempt ended, in its own words."""

    code: int
    step: int
    value: float | None
    seconds: float
    tail: str = ""

    def write(self, folder: Path, attempt: int) -> None:
        write_whole(folder / f"outcome-{attempt}.json", json.dumps(asdict(self)) + "\n")

    @classmethod
    def read(cls, folder: Path, attempt: int) -> Outcome | None:
        """None where the attempt has left no word."""
        path = folder / f"outcome-{attempt}.json"
        if not path.is_file():
            return None
        return cls(**json.loads(path.read_text(encoding="utf-8")))


class Backend(Protocol):
    """A place where attempts run. A handle is text that any scheduler process can use, also a later one."""

    def start(self, job: Job) -> str:
        """Start the job and return its handle. Raises RunError where it cannot be started."""

    def find(self, token: str) -> str | None:
        """The handle of an attempt that was started but not written down; None: there is none."""

    def alive(self, handle: str) -> bool:
        """Whether anything of the attempt still runs or waits to."""

    def exit_code(self, handle: str) -> int | None:
        """The code of an attempt that is not alive, where it is known; below 0: a signal."""

    def leave(self, handle: str) -> None:
        """Ask to save and leave."""

    def kill(self, handle: str, token: str) -> None:
        """End all of it at once."""

    def held_mb(self, handle: str) -> float | None:
        """Memory that an attempt holds; None where the back-end itself keeps to the limit."""

    def close(self) -> None:
        """Let go of what the back-end holds; attempts go on."""


def seen(folder: Path, metric: str, budget: int | None = None) -> tuple[int, float | None]:
    """(last step, latest value) of a trial's log, up to a budget; no value where the latest is not finite."""
    step, value = 0, None
    for line in lines(folder / RUN / METRICS):
        if budget is not None and line["step"] > budget:
            break
        step = line["step"]
        found = line.get(metric)
        if isinstance(found, (int, float)):
            value = float(found) if math.isfinite(found) else None
    return step, value


def curve(folder: Path, metric: str) -> list[tuple[int, float]]:
    """(step, value) of all that was measured and is finite."""
    found = ((x["step"], x.get(metric)) for x in lines(folder / RUN / METRICS))
    return [(s, float(v)) for s, v in found if isinstance(v, (int, float)) and math.isfinite(v)]


def lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a log with a whole-numbered step; anything else is passed over."""
    if not path.is_file():
        return
    for text in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            yield line


def tail(folder: Path, count: int = 12) -> str:
    """The end of a trial's log."""
    path = folder / LOG
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 8192))
        text = file.read().decode("utf-8", "replace")
    return "\n".join(text.splitlines()[-count:])
