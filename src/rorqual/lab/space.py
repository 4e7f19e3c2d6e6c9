"""A family of trials from ranges, drawn from a seed: the same words give the same trials."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rorqual.config import scalar
from rorqual.errors import ConfigError


@dataclass(frozen=True)
class Choice:
    """One of a list."""

    values: tuple[Any, ...]

    def draw(self, u: float) -> Any:
        """The value at u, 0 to below 1."""
        return self.values[int(u * len(self.values))]


@dataclass(frozen=True)
class Range:
    """A number between two, even on a line or, with `log`, on a scale of ratios."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def draw(self, u: float) -> float:
        if self.whole:
            low, high = self.low, self.high + 1
            value = math.floor(_between(low, high, u, self.log))
            return int(min(max(value, self.low), self.high))
        return float(f"{_between(self.low, self.high, u, self.log):.4g}")


@dataclass(frozen=True)
class Space:
    """Keys and what each is drawn from."""

    axes: tuple[tuple[str, Choice | Range], ...]

    @classmethod
    def parse(cls, words: Sequence[str]) -> Space:
        """`optim.lr=1e-3..1e-1:log`, `shape.experts=8..32:int`, `shape.balance=bias|loss`. Raises ConfigError."""
        axes: dict[str, Choice | Range] = {}
        for word in words:
            key, sign, text = word.partition("=")
            if not sign or not key.strip() or not text.strip():
                raise ConfigError(f"--vary {word}: write it as KEY=LOW..HIGH, KEY=LOW..HIGH:log or KEY=A|B|C")
            if key in axes:
                raise ConfigError(f"--vary {key}: named twice")
            axes[key.strip()] = _axis(word, text.strip())
        return cls(tuple(axes.items()))

    def draw(self, count: int, seed: int) -> list[dict[str, Any]]:
        """So many points. Each axis is cut into `count` strata of which every point takes another one (a Latin
        hypercube), so that a few points cover every axis. Raises ConfigError below 1."""
        if count < 1:
            raise ConfigError(f"--trials {count}: must be 1 or more")
        randomly = random.Random(seed)
        columns = []
        for _ in self.axes:
            places = list(range(count))
            randomly.shuffle(places)
            columns.append([(p + randomly.random()) / count for p in places])
        return [
            {key: axis.draw(columns[i][n]) for i, (key, axis) in enumerate(self.axes)} for n in range(count)
        ]

    def grid(self) -> list[dict[str, Any]]:
        """All combinations. Raises ConfigError for a range."""
        lists = []
        for key, axis in self.axes:
            if isinstance(axis, Range):
                raise ConfigError(f"--grid: {key} is a range; write its values as A|B|C")
            lists.append([(key, v) for v in axis.values])
        return [dict(point) for point in itertools.product(*lists)]


def _axis(word: str, text: str) -> Choice | Range:
    if ".." not in text:
        return Choice(tuple(scalar(v.strip()) for v in text.split("|")))
    ends, _, how = text.partition(":")
    low, high = (scalar(v.strip()) for v in ends.split("..", 1))
    if (
        not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (low, high))
        or not low < high
    ):
        raise ConfigError(f"--vary {word}: low..high must be two rising numbers")
    if how not in ("", "log", "int"):
        raise ConfigError(f"--vary {word}: {how!r} must be log or int")
    if how == "log" and low <= 0:
        raise ConfigError(f"--vary {word}: a log range begins above 0")
    return Range(low, high, how == "log", how == "int")


def _between(low: float, high: float, u: float, log: bool) -> float:
    return math.exp(math.log(low) + (math.log(high) - math.log(low)) * u) if log else low + (high - low) * u
