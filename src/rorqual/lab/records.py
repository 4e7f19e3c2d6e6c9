"""What the lab's state file holds: studies, trials, attempts, the story."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from rorqual.lab.rungs import Ladder


@dataclass(frozen=True)
class Study:
    """Trials that are measured alike and compete for places."""

    id: int
    name: str
    ladder: Ladder
    metric: str


@dataclass(frozen=True)
class Trial:
    """An idea. `target` is the rung it runs to, `place` the highest it was given a place on, `reached` how many rungs
    it has a value at; `seconds` of a slot, `step` the last one seen."""

    id: int
    study: int
    who: str
    name: str
    kind: str
    spec: dict[str, Any]
    settings: dict[str, Any]
    priority: int
    state: str
    target: int
    place: int
    reached: int
    failures: int
    step: int
    attempts: int
    seconds: float
    value: float | None
    message: str
    made: float

    @property
    def bonus(self) -> bool:
        """Whether it runs to a rung on which it has no place."""
        return self.target > self.place


@dataclass(frozen=True)
class Attempt:
    """One start of a trial. `asked`: why it was asked to leave."""

    id: int
    trial: int
    target: int
    bonus: bool
    backend: str
    handle: str | None
    state: str
    asked: str
    code: int | None
    seconds: float
    step: int


@dataclass(frozen=True)
class Event:
    """A line of the story."""

    seq: int
    at: float
    kind: str
    trial: int | None
    text: str


@dataclass(frozen=True)
class Ended:
    """How an attempt ended, as the scheduler saw it. `code` None: without a word."""

    code: int | None
    step: int
    value: float | None = None
    seconds: float = 0.0
    tail: str = ""
    retry: bool = True  # whether another attempt may help
    excuse: str = ""  # why a failure does not count against the trial
