"""Families of problems whose answers a program can check, by name.

>>> sums = create("sums", terms=3, digits=2)
>>> problem = sums.make(seed=0, index=7)
>>> sums.grade(problem, problem.worked).is_right

A problem is a function of (seed, index, difficulty, split) and of the task's options, the same in every process
and on every machine, so a stream has no end and can be entered anywhere. The training and the held-out stream
of a task share no problem, whatever their seeds: a problem's content decides to which of them it belongs.
"""

from __future__ import annotations

import hashlib
import importlib
import random
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

from rorqual.config import from_dict
from rorqual.errors import ConfigError
from rorqual.verify.outcome import Outcome, grader_failed, wrong

Split = Literal["train", "held_out"]

HELD_OUT_SHARE = 0.1  # of a family's problems; the rest is for training
DRAWS = 2000  # tries to find a problem of a split before the family is called too small
REPEATS = 20  # times as many repeats in a row as there are problems: all were seen, rare ones too


@dataclass(frozen=True)
class Problem:
    """One problem. `prompt` is plain text: a chat model gets it as the user's message."""

    prompt: str
    answer: Any  # what the task's own `grade` compares with
    key: str  # its content, equal for problems that are the same but for form; decides the split
    worked: str | None = None  # a completion that earns RIGHT, steps shown where the family has them
    meta: Mapping[str, Any] = field(default_factory=dict)


class Task(Protocol):
    """A family of problems. `levels` difficulties, 0 the easiest; None asks for the hardest."""

    @property
    def name(self) -> str: ...

    @property
    def levels(self) -> int: ...

    def prepare(self) -> None: ...

    def make(
        self, seed: int, index: int, difficulty: int | None = None, split: Split = "train"
    ) -> Problem: ...

    def grade(self, problem: Problem, completion: str) -> Outcome: ...


@dataclass(frozen=True)
class Family(ABC):
    """The common part of our tasks: a subclass says how one problem is drawn and how a completion is judged.

    Subclasses are frozen dataclasses whose fields are the task's options.
    """

    name: ClassVar[str]

    @property
    def levels(self) -> int:
        return 1

    def prepare(self) -> None:  # noqa: B027
        """Start what grading needs, if anything; call it before a run. Raises where there is no such thing to be had."""

    @abstractmethod
    def draw(self, rng: random.Random, level: int) -> Problem:
        """One problem of a level; all that is random comes from `rng`."""

    @abstractmethod
    def judge(self, problem: Problem, completion: str) -> Outcome:
        """The verdict; an exception here counts as a failure of the grader."""

    def make(self, seed: int, index: int, difficulty: int | None = None, split: Split = "train") -> Problem:
        """Problem `index` of the stream `seed`. Raises ConfigError for a level or split that is not there."""
        if split not in ("train", "held_out"):
            raise ConfigError(f"split={split!r}: must be 'train' or 'held_out'")
        level = self.levels - 1 if difficulty is None else difficulty
        if not 0 <= level < self.levels:
            raise ConfigError(f"difficulty={difficulty}: task {self.name} has levels 0 to {self.levels - 1}")
        rng = random.Random(f"{self.name}/{seed}/{index}/{level}/{split}")
        for _ in range(DRAWS):
            problem = self.draw(rng, level)
            if split_of(self.name, problem.key) == split:
                return problem
        raise ConfigError(
            f"task {self.name}, difficulty {level}: too few problems for a {split} stream; raise its sizes"
        )

    def grade(self, problem: Problem, completion: str) -> Outcome:
        """The verdict on a completion; never raises."""
        if not isinstance(completion, str) or not completion.strip():
            return wrong("empty completion")
        try:
            return self.judge(problem, completion)
        except Exception as e:
            return grader_failed(f"{type(e).__name__}: {e}")


def split_of(name: str, key: str) -> Split:
    """To which stream of the task `name` the problem `key` belongs."""
    digest = hashlib.sha256(f"{name}\n{key}".encode()).digest()
    return "held_out" if int.from_bytes(digest[:8], "big") < HELD_OUT_SHARE * 2**64 else "train"


class Place(NamedTuple):
    """Where a task lives; imported when it is asked for."""

    module: str
    cls: str
    help: str


TASKS: dict[str, Place] = {
    "sums": Place("rorqual.verify.sums", "Sums", "a+b+c=, with or without visible steps"),
    "countdown": Place(
        "rorqual.verify.countdown", "Countdown", "an expression of given numbers for a target"
    ),
    "list_programs": Place("rorqual.verify.list_programs", "ListPrograms", "carry out operations on a list"),
    "functions": Place("rorqual.verify.functions", "Functions", "write a small function; hidden tests"),
    "gym": Place("rorqual.verify.gym", "Gym", "families of reasoning-gym with sound scorers"),
}


def create(name: str, **options: Any) -> Task:
    """The task `name` with its options. Raises ConfigError for an unknown name, option or value."""
    if name not in TASKS:
        raise ConfigError(f"task {name!r}: unknown; there are {', '.join(sorted(TASKS))}")
    place = TASKS[name]
    cls = getattr(importlib.import_module(place.module), place.cls)
    task: Task = from_dict(cls, options, where=f"tasks.{name}")
    return task


def held_out(task: Task, count: int, seed: int, difficulty: int | None = None) -> list[Problem]:
    """The first `count` different held-out problems of a stream; of a small family all that there are. A problem that
    came twice would count twice in an accuracy and not make its interval smaller in truth."""
    found: dict[str, Problem] = {}
    index = repeats = 0
    while len(found) < count and repeats < REPEATS * (len(found) + 10):
        problem = task.make(seed, index, difficulty, "held_out")
        repeats = repeats + 1 if problem.key in found else 0
        found.setdefault(problem.key, problem)
        index += 1
    return list(found.values())


def grade_all(task: Task, pairs: Sequence[tuple[Problem, str]], threads: int = 8) -> list[Outcome]:
    """Verdicts in order. Tasks that wait for other processes (maths, code) are graded side by side."""
    if threads <= 1 or len(pairs) <= 1 or not getattr(task, "waits", False):
        return [task.grade(problem, completion) for problem, completion in pairs]
    with ThreadPoolExecutor(min(threads, len(pairs))) as pool:
        return list(pool.map(lambda pair: task.grade(*pair), pairs))
