"""Problems of several families, mixed by weight, each at the difficulty of the moment; and the held-out ones."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from rorqual.rl.config import TaskMix
from rorqual.verify.tasks import Problem, Task

WORKED = 0xC01D  # added to the run's seed for the problems of the cold start


@dataclass(frozen=True)
class Posed:
    """A problem with the family that it is of."""

    task: Task
    problem: Problem


class Mix:
    """An endless line of problems: which one is at a place depends on seed, place and share of the run alone."""

    def __init__(self, mixes: Sequence[TaskMix], tasks: Sequence[Task], seed: int, held_out: int) -> None:
        self.mixes, self.tasks, self.seed = mixes, tasks, seed
        self.held_out = {
            mix.name: [
                Posed(task, task.make(seed, i, mix.difficulty_at(1.0), "held_out")) for i in range(held_out)
            ]
            for mix, task in zip(mixes, tasks, strict=True)
        }

    def at(self, place: int, share: float, seed: int = 0) -> Posed:
        """The problem at a place of a line when this share of the run is done. None of them is held out."""
        dice = random.Random(f"{self.seed}/{seed}/{place}")
        which = dice.choices(range(len(self.mixes)), [m.weight for m in self.mixes])[0]
        task = self.tasks[which]
        return Posed(task, task.make(self.seed + seed, place, self.mixes[which].difficulty_at(share)))
