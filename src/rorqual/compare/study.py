"""The measure: how much less a setting needs to reach what another reaches.

A baseline runs N steps. The recipe runs its *whole* schedule at N/1.5, N/2, N/3 …: the passing point is the smallest
number of steps at which every one of its seeds reaches the baseline's final held-out loss (the mean of the baseline's
seeds). Nothing is read off the middle of a curve.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import count
from math import exp, log
from pathlib import Path
from statistics import mean

from rorqual.compare.budget import Budget
from rorqual.compare.job import Job, Result
from rorqual.compare.pool import Pool
from rorqual.compare.setting import BASE, TABLES, Setting


@dataclass(frozen=True)
class Pools:
    """Where the training text lies, and whose held-out set judges all runs."""

    built: Path
    runs: Path
    found: Path | None = None  # the pool as it was found


@dataclass(frozen=True)
class Tried:
    """An arm of the search for the baseline: a budget with its rates and depth, and the run."""

    budget: Budget
    result: Result


@dataclass(frozen=True)
class Point:
    """A setting at one number of steps, all seeds."""

    setting: str
    steps: int
    results: tuple[Result, ...]

    @property
    def losses(self) -> list[float]:
        return [r.loss for r in self.results]

    @property
    def loss(self) -> float:
        return mean(self.losses)

    @property
    def flops(self) -> float:
        return mean(r.flops for r in self.results)  # sampled softmax differs a little from seed to seed

    @property
    def seconds(self) -> float:
        """Of the processor: a run has one thread, so they are the clock's on a machine that does nothing else."""
        return mean(r.cpu_seconds for r in self.results)

    @property
    def bytes(self) -> float:
        return mean(r.peak_bytes for r in self.results)

    def reaches(self, target: float) -> bool:
        """Whether every seed does."""
        return max(self.losses) <= target


@dataclass(frozen=True)
class Match:
    """One comparison: a baseline at its full steps, the recipe's runs, and where they pass (None: nowhere)."""

    baseline: Point
    runs: tuple[Point, ...]  # the most steps first
    passing: Point | None

    @property
    def factors(self) -> dict[str, float]:
        """How many times less the recipe needs: tokens, FLOPs, processor seconds, memory."""
        if self.passing is None:
            return {}
        b, p = self.baseline, self.passing
        return {
            "tokens": b.results[0].tokens / p.results[0].tokens,
            "FLOPs": b.flops / p.flops,
            "seconds": b.seconds / p.seconds,
            "memory": b.bytes / p.bytes,
        }


class Study:
    """Runs of one budget on one machine."""

    def __init__(self, budget: Budget, pools: Pools, pool: Pool) -> None:
        self.budget, self.pools, self.pool = budget, pools, pool

    def point(self, setting: Setting, steps: int, seeds: int, data: Path | None = None) -> Point:
        """Every seed of a setting at a number of steps."""
        results = self.pool.all(self.job(setting, steps, seed, data) for seed in range(seeds))
        return Point(setting.name, steps, tuple(results))

    def job(self, setting: Setting, steps: int, seed: int, data: Path | None = None) -> Job:
        """One run."""
        return Job(
            setting, self.budget, steps, seed, data or self.pools.built, self.pools.built, self.pools.runs
        )

    @property
    def baseline(self) -> Setting:
        """The baseline at the budget's rates."""
        b = self.budget
        return BASE.at(optim__lr=b.lr, optim__embedding_lr=b.embedding_lr, optim__head_lr=b.head_lr)

    def beginning(self) -> Result:
        """The baseline's run where its search begins."""
        return self._run([self.budget])[0].result

    def _run(self, arms: Sequence[Budget]) -> list[Tried]:
        studies = [Study(b, self.pools, self.pool) for b in arms]
        results = self.pool.all(s.job(s.baseline, s.budget.steps, 0) for s in studies)
        return [Tried(b, r) for b, r in zip(arms, results, strict=True)]

    def sweep(self, rounds: int = 0) -> tuple[Study, list[Tried]]:
        """The study at the baseline's best rates and depth, and all runs of the search. One after another, again and
        again until a round changes none of them, or `rounds` are done: a single round from a bad beginning ended 0.26
        nats above the best of 240 steps."""
        best = self.budget
        tried: dict[Budget, Tried] = {}
        for done in count(1):
            before = best
            for key in ("lr", "embedding_lr", "head_lr", *(["depth"] if best.search_depth else [])):
                best = self._best(key, best, tried)
            if best == before or done == rounds:
                break
        return Study(best, self.pools, self.pool), list(tried.values())

    def _best(self, key: str, middle: Budget, tried: dict[Budget, Tried]) -> Budget:
        """The best value of one key beside the others: the search goes on while it lies at an end."""
        around = [*self._lower(key, middle), middle, *self._higher(key, middle)]
        for _ in range(1 + middle.more_rates):
            found = self._run(around)
            tried |= {t.budget: t for t in found}
            # Where a value changes nothing it stays.
            best = min(found, key=lambda t: (t.result.loss, t.budget != middle)).budget
            lower = self._lower(key, best) if best == around[0] else []
            higher = self._higher(key, best) if best == around[-1] else []
            if not lower and not higher:
                break
            around = [*lower, *around, *higher]
        return best

    def _lower(self, key: str, b: Budget) -> list[Budget]:
        """The next below in a search, if there is one: half a rate, or a layer less."""
        if key != "depth":
            return [dataclasses.replace(b, **{key: getattr(b, key) / 2})]
        return [self._deep(b, b.depth - 1)] if b.depth > 1 else []

    def _higher(self, key: str, b: Budget) -> list[Budget]:
        if key != "depth":
            return [dataclasses.replace(b, **{key: getattr(b, key) * 2})]
        return [self._deep(b, b.depth + 1)]

    def _deep(self, b: Budget, depth: int) -> Budget:
        """Steps are counted from the study's own, so that a depth that is tried again has the same."""
        return self.budget.like(dataclasses.replace(b, depth=depth))

    def match(self, recipe: Setting, baseline: Setting, seeds: int, data: Path | None = None) -> Match:
        """Where the recipe passes the baseline. `data`: the pool of the baseline, where it is another."""
        base = self.point(baseline, self.budget.steps, seeds, data)
        target = base.loss
        runs: dict[float, Point] = {}

        def passes(fraction: float) -> bool:
            runs[fraction] = self.point(recipe, self.budget.steps_at(fraction), seeds)
            return runs[fraction].reaches(target)

        best = last_passing(self.budget.fractions, passes)
        points = tuple(runs[f] for f in sorted(runs))
        return Match(base, points, None if best is None else runs[best])

    def controls(self) -> list[Setting]:
        """The baseline with the recipe's tables, at its own rates, and under the recipe's optimizer, whose rates are its
        own."""
        return [
            self.baseline.plus("baseline with the tables", TABLES),
            self.baseline.plus("baseline under Muon", ("muon",)),
        ]


def last_passing(fractions: Sequence[float], passes: Callable[[float], bool]) -> float | None:
    """The largest fraction that passes, taking it that a smaller one then passes as well: from the middle outwards, so
    that the long runs at small fractions are spared where they can be."""
    low, high = -1, len(fractions)  # low passes (or is none), high does not (or is none)
    while high - low > 1:
        middle = (low + high) // 2
        if passes(fractions[middle]):
            low = middle
        else:
            high = middle
    return None if low < 0 else fractions[low]


def equivalent_steps(loss: float, at: int, reference: Sequence[Point]) -> float:
    """How many steps the reference would need for a loss, by a line through its points over log steps (two or more);
    `at` is where the loss was reached, and the answer where the reference has one point only."""
    points = sorted((log(p.steps), p.loss) for p in reference)
    if len(points) < 2:
        return float(at)
    mx, my = mean(x for x, _ in points), mean(y for _, y in points)
    slope = sum((x - mx) * (y - my) for x, y in points) / sum((x - mx) ** 2 for x, _ in points)
    return exp(mx + (loss - my) / slope)
