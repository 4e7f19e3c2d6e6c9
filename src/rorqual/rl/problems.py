"""Problems of several families, mixed by weight, each at the difficulty of the moment; and the held-out ones."""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rorqual.errors import ConfigError
from rorqual.rl.config import TaskMix
from rorqual.verify.tasks import Problem, Task, create, held_out

WORKED = 0xC01D  # added to the run's seed for the problems of the cold start


def family(mix: TaskMix) -> Task:
    """The family that a mix names: a known one, or what a function in a file of one's own returns."""
    place, colon, function = mix.name.rpartition(":")
    if not colon:
        return create(mix.name, **mix.options)
    path = Path(place).expanduser().resolve()
    if not path.is_file():
        raise ConfigError(f"tasks.name={mix.name!r}: no file {path}; write it as path/to/file.py:function")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not hasattr(module, function):
        raise ConfigError(f"tasks.name={mix.name!r}: {path} has no {function!r}")
    task: Task = getattr(module, function)(**mix.options)
    return task


@dataclass(frozen=True)
class Posed:
    """A problem with the family that it is of and what that is called."""

    task: Task
    problem: Problem
    label: str


class Mix:
    """An endless line of problems: which one is at a place depends on seed, place and share of the run alone."""

    def __init__(self, mixes: Sequence[TaskMix], tasks: Sequence[Task], seed: int, count: int) -> None:
        self.mixes, self.tasks, self.seed = mixes, tasks, seed
        self.held_out = {
            mix.label: [
                Posed(task, problem, mix.label)
                for problem in held_out(task, count, seed, mix.difficulty_at(1.0))
            ]
            for mix, task in zip(mixes, tasks, strict=True)
        }

    def at(self, place: int, share: float, seed: int = 0) -> Posed:
        """The problem at a place of a line when this share of the run is done. None of them is held out."""
        dice = random.Random(f"{self.seed}/{seed}/{place}")
        which = dice.choices(range(len(self.mixes)), [m.weight for m in self.mixes])[0]
        task, mix = self.tasks[which], self.mixes[which]
        return Posed(task, task.make(self.seed + seed, place, mix.difficulty_at(share)), mix.label)
