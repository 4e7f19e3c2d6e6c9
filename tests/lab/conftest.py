"""Labs on a clock of our own, with a back-end that replays curves instead of computing them."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from rorqual.lab.job import Job, Outcome
from rorqual.lab.records import Study
from rorqual.lab.rungs import Ladder
from rorqual.lab.scheduler import Scheduler
from rorqual.lab.settings import Settings
from rorqual.lab.store import PRIORITIES, Store

Curve = Callable[[dict[str, Any], int], float]


@dataclass
class Replay:
    """A machine on which a step takes a second of its own clock. Everything that ran is in `starts` and `work`."""

    curve: Curve = lambda settings, step: settings["x"] + 1 / step
    now: float = 0.0
    starts: list[tuple[int, int]] = field(default_factory=list)  # (attempt, budget)
    done: dict[str, int] = field(default_factory=dict)  # steps saved, by folder
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    work: list[tuple[str, int, int]] = field(default_factory=list)  # (folder, from step, to step)
    crash: Callable[[Job], bool] = lambda job: False
    numbers: Any = field(default_factory=lambda: itertools.count(1))

    def clock(self) -> float:
        return self.now

    def start(self, job: Job) -> str:
        handle = f"h{next(self.numbers)}"
        begun = self.done.get(job.folder, 0)
        assert not any(r["job"].folder == job.folder and r["on"] for r in self.runs.values()), (
            "two in one folder"
        )
        self.starts.append((job.attempt, job.budget))
        self.runs[handle] = {"job": job, "since": self.now, "from": begun, "on": True, "asked": False}
        return handle

    def advance(self, seconds: float) -> None:
        """Let time pass; attempts whose steps are done leave their outcome."""
        self.now += seconds
        for run in self.runs.values():
            if run["on"]:
                self._look(run)

    def _look(self, run: dict[str, Any]) -> None:
        job: Job = run["job"]
        step = min(job.budget, run["from"] + int(self.now - run["since"]))
        if self.crash(job):
            self._end(run, run["from"], 1, "Traceback\nValueError: always")
        elif run["asked"] or step >= job.budget:
            self._end(run, step, 0 if step >= job.budget else 75)

    def _end(self, run: dict[str, Any], step: int, code: int, tail: str = "") -> None:
        job: Job = run["job"]
        run["on"] = False
        self.done[job.folder] = step
        self.work.append((job.folder, run["from"], step))
        value = self.curve(job.settings, step) if step else None
        Outcome(code, step, value, self.now - run["since"], tail).write(Path(job.folder), job.attempt)

    def find(self, token: str) -> str | None:
        return next((h for h, r in self.runs.items() if r["job"].token == token and r["on"]), None)

    def alive(self, handle: str) -> bool:
        return handle in self.runs and self.runs[handle]["on"]

    def exit_code(self, handle: str) -> int | None:
        return None

    def leave(self, handle: str) -> None:
        self.runs[handle]["asked"] = True

    def kill(self, handle: str, token: str) -> None:
        """What was not saved is lost."""
        for h in {handle, self.find(token)}:
            if h in self.runs:
                self.runs[h]["on"] = False

    def held_mb(self, handle: str) -> float | None:
        return None

    def close(self) -> None: ...


@dataclass
class Lab:
    """A lab whose time is the back-end's."""

    store: Store
    backend: Replay
    scheduler: Scheduler
    ladder: Ladder

    @property
    def study(self) -> Study:
        return self.store.study("study", self.ladder, "loss")

    def add(self, x: float, who: str = "ada", priority: str = "normal", **more: Any) -> int:
        return self.store.add(
            self.study,
            who,
            f"x={x}",
            "function",
            {"function": "m:f", "folder": "/"},
            {"x": x, **more},
            PRIORITIES[priority],
        )

    def look(self, seconds: float = 0.0) -> bool:
        """Let time pass, then tick until nothing more changes."""
        self.backend.advance(seconds)
        work = False
        for _ in range(60):
            before = self.store.db.total_changes
            work = self.scheduler.tick()
            if self.store.db.total_changes == before:
                break
        return work

    def finish(self, most: int = 5000) -> int:
        """Run until there is no work; returns seconds of its clock."""
        for second in range(most):
            if not self.look(1.0 if second else 0.0):
                return second
        raise AssertionError(f"not done after {most} seconds:\n{json.dumps(self.states())}")

    def states(self) -> dict[int, str]:
        return {t.id: t.state for t in self.store.trials()}

    def steps(self) -> int:
        """All steps that were computed."""
        return sum(to - begun for _, begun, to in self.backend.work)


@pytest.fixture
def make_lab(tmp_path: Path) -> Callable[..., Lab]:
    """A lab of `slots` slots with rungs at 1, 3 and 9 steps."""

    def make(
        slots: int = 1, budgets: tuple[int, ...] = (1, 3, 9), folder: str = "lab", **changes: Any
    ) -> Lab:
        store = Store(tmp_path / folder)
        backend = Replay()
        settings = Settings(slots=slots, memory_mb=1000, min_free_mb=0, **changes)
        scheduler = Scheduler(store, backend, settings, say=lambda _: None, clock=backend.clock)
        return Lab(store, backend, scheduler, Ladder(budgets))

    return make
