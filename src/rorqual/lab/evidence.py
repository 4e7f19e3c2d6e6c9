"""Which settings mattered: pure functions from settings and values to shares, chances and differences.

A setting's share is how much of the spread of the trials' ranks its groups explain (numbers are cut into thirds). The
chance is how often a random exchange of the values explains as much. Ranks, because a diverged trial is only last."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

SHUFFLES = 2000
ENOUGH = 6  # trials, below which nothing is said about a setting
SEED = "seed"  # trials that differ in nothing else are repeats: they measure the noise

Row = tuple[Mapping[str, Any], float]  # settings, and a value of which less is better


@dataclass(frozen=True)
class Effect:
    """One setting over the trials of one rung. `groups`: (label, trials, mean value), best first."""

    key: str
    share: float
    chance: float
    trials: int
    groups: tuple[tuple[str, int, float], ...]
    mattered: bool = False


@dataclass(frozen=True)
class Change:
    """Trials of one idea against those without settings. `noise`: spread between repeats; None: no repeats."""

    settings: Mapping[str, Any]
    trials: int
    difference: float
    noise: float | None

    @property
    def sure(self) -> bool:
        """Beyond twice the noise of a difference of two trials."""
        return self.noise is not None and abs(self.difference) > 2 * math.sqrt(2) * self.noise


def effects(rows: Sequence[Row], seed: int = 0) -> list[Effect]:
    """Every setting that varies, the one that explains most first. `mattered`: a chance below 5% after Holm's
    correction for how many were looked at."""
    if len(rows) < ENOUGH:
        return []
    ranks = ranked([v for _, v in rows])
    keys = sorted({k for s, _ in rows for k in s})
    found = []
    for key in keys:
        labels = grouped([s.get(key) for s, _ in rows])
        if len(set(labels)) < 2 or len(set(labels)) > len(rows) // 2:
            continue
        share, chance = explained(labels, ranks), 0
        shuffled, randomly = list(ranks), random.Random(f"{seed} {key}")
        for _ in range(SHUFFLES):
            randomly.shuffle(shuffled)
            chance += explained(labels, shuffled) >= share - 1e-12
        found.append(Effect(key, share, (chance + 1) / (SHUFFLES + 1), len(rows), _groups(labels, rows)))
    return sorted(_holm(found), key=lambda e: (-e.share, e.key))


def changes(rows: Sequence[Row]) -> list[Change]:
    """Each idea against the trials that change nothing, best first; empty where there are none of those."""
    by: dict[str, list[float]] = {}
    settings: dict[str, Mapping[str, Any]] = {}
    for s, value in rows:
        plain = {k: v for k, v in sorted(s.items()) if k != SEED}
        by.setdefault(str(plain), []).append(value)
        settings[str(plain)] = plain
    base = [v for v in by.pop("{}", []) if math.isfinite(v)]
    if not base:
        return []
    spread = noise([*by.values(), base])
    mean = sum(base) / len(base)
    found = [
        Change(settings[k], len(vs), sum(vs) / len(vs) - mean, spread)
        for k, vs in by.items()
        if all(map(math.isfinite, vs))
    ]
    return sorted(found, key=lambda c: c.difference)


def noise(groups: Sequence[Sequence[float]]) -> float | None:
    """The spread within groups of repeats, pooled; None without repeats."""
    squares, free = 0.0, 0
    for values in groups:
        if len(values) > 1 and all(map(math.isfinite, values)):
            mean = sum(values) / len(values)
            squares += sum((v - mean) ** 2 for v in values)
            free += len(values) - 1
    return math.sqrt(squares / free) if free else None


def grouped(values: Sequence[Any]) -> list[str]:
    """A label for each value: itself, or its third where there are many numbers."""
    numbers = [v for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    distinct = sorted(set(numbers))
    if len(distinct) <= 4:
        return ["default" if v is None else str(v) for v in values]
    cuts = [distinct[len(distinct) // 3], distinct[2 * len(distinct) // 3]]
    names = (
        f"{distinct[0]:.3g} to {cuts[0]:.3g}", f"{cuts[0]:.3g} to {cuts[1]:.3g}", f"{cuts[1]:.3g} to {distinct[-1]:.3g}",
    )  # fmt: skip
    return [
        ("default" if v is None else str(v)) if v not in numbers else names[sum(v >= c for c in cuts)]
        for v in values
    ]


def ranked(values: Sequence[float]) -> list[float]:
    """Ranks from 0, equals sharing the mean of theirs; what is not finite is last."""
    keys = [v if math.isfinite(v) else math.inf for v in values]
    order = sorted(range(len(keys)), key=lambda i: keys[i])
    ranks = [0.0] * len(keys)
    begin = 0
    while begin < len(order):
        end = begin
        while end < len(order) and keys[order[end]] == keys[order[begin]]:
            end += 1
        for i in order[begin:end]:
            ranks[i] = (begin + end - 1) / 2
        begin = end
    return ranks


def explained(labels: Sequence[str], ranks: Sequence[float]) -> float:
    """The share of the ranks' squared spread that lies between the groups."""
    mean = sum(ranks) / len(ranks)
    whole = sum((r - mean) ** 2 for r in ranks)
    if not whole:
        return 0.0
    sums: dict[str, list[float]] = {}
    for label, rank in zip(labels, ranks, strict=True):
        entry = sums.setdefault(label, [0.0, 0.0])
        entry[0] += rank
        entry[1] += 1
    return sum(n * (total / n - mean) ** 2 for total, n in sums.values()) / whole


def _groups(labels: Sequence[str], rows: Sequence[Row]) -> tuple[tuple[str, int, float], ...]:
    by: dict[str, list[float]] = {}
    for label, (_, value) in zip(labels, rows, strict=True):
        by.setdefault(label, []).append(value)
    found = [(k, len(v), sum(v) / len(v)) for k, v in by.items()]
    return tuple(sorted(found, key=lambda g: (g[2] if math.isfinite(g[2]) else math.inf, g[0])))


def _holm(found: Sequence[Effect]) -> list[Effect]:
    out, holds = [], True
    for i, e in enumerate(sorted(found, key=lambda e: e.chance)):
        holds = holds and e.chance * (len(found) - i) < 0.05
        out.append(Effect(e.key, e.share, e.chance, e.trials, e.groups, holds))
    return out
