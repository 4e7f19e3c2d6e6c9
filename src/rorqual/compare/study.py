"""The measure: how much less a setting needs to reach what another reaches.

A baseline runs N steps. The recipe runs its *whole* schedule at N/1.5, N/2, N/3 …: the passing point is the smallest
number of steps at which every one of its seeds reaches the baseline's final held-out loss (the mean of the baseline's
seeds). Nothing is read off the middle of a curve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import exp, log
from pathlib import Path
from statistics import mean

from rorqual.compare.budget import Budget
from rorqual.compare.job import Job, Result
from rorqual.compare.pool import Pool
from rorqual.compare.setting import BASE, EQUAL_OPTIMIZER, EQUAL_PARAMETERS, Setting


@dataclass(frozen=True)
class Pools:
    """Where the training text lies, and whose held-out set judges all runs."""

    built: Path
    runs: Path
    found: Path | None = None  # the pool as it was found


@dataclass(frozen=True)
class Tried:
    """Rates of the baseline's sweep, by their keys, and their run."""

    rates: dict[str, float]
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
        return self.results[0].flops

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
    def _begin(self) -> dict[str, float]:
        b = self.budget
        return {"optim.lr": b.lr, "optim.embedding_lr": b.embedding_lr, "optim.head_lr": b.head_lr}

    def beginning(self) -> Result:
        """The baseline's run where the search for its rates begins."""
        return self.pool.all([self.job(_at(self._begin), self.budget.steps, 0)])[0]

    def sweep(self) -> tuple[Setting, list[Tried]]:
        """The baseline at its best rates, and all runs. Rate by rate, again and again until a round changes none of them:
        a single round from a bad beginning ended 0.26 nats above the best of 240 steps."""
        best = self._begin
        tried: dict[tuple[float, ...], Tried] = {}
        while True:
            before = dict(best)
            for key in best:
                best[key] = self._best(key, best, tried)
            if best == before:
                return _at(best), list(tried.values())

    def _best(self, key: str, rates: dict[str, float], tried: dict[tuple[float, ...], Tried]) -> float:
        """The best of one rate beside the others, a factor of two from the next: the search goes on while it lies at an
        end."""
        middle = rates[key]
        around = [middle / 2, middle, middle * 2]
        for _ in range(1 + self.budget.more_rates):
            arms = [rates | {key: rate} for rate in around]
            results = self.pool.all(self.job(_at(arm), self.budget.steps, 0) for arm in arms)
            tried |= {tuple(arm.values()): Tried(arm, r) for arm, r in zip(arms, results, strict=True)}
            # Where a rate changes nothing it stays.
            best = min(range(len(around)), key=lambda i: (results[i].loss, around[i] != middle))
            if 0 < best < len(around) - 1:
                break
            around = [around[0] / 2, *around] if best == 0 else [*around, around[-1] * 2]
        return arms[best][key]

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

    def controls(self, baseline: Setting) -> list[Setting]:
        """The baseline with the recipe's tables, and under its optimizer: each at the swept rate where it keeps it."""
        return [
            Setting(EQUAL_PARAMETERS.name, EQUAL_PARAMETERS.parts, baseline.more),
            EQUAL_OPTIMIZER,  # Muon's rate is its own
        ]


def _at(rates: dict[str, float]) -> Setting:
    """The baseline at its rates."""
    return BASE.at(**{key.replace(".", "__"): rate for key, rate in rates.items()})


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
