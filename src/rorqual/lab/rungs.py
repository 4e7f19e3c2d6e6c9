"""Who is promoted: asynchronous successive halving that pauses and promotes, as pure functions of who stands where.

A trial begins at rung 0, the smallest budget, and pauses at each rung that it reaches. Of the n that have reached a rung
the best n // eta have a place on the next. A place is given as soon as there is one, to the best who waits; it is never
taken back, and there are never more places than n // eta. So ideas that arrive worst first cost no more than others
(Li et al., arXiv 1810.05934, promote whoever is among the best third at the moment, which then is everyone).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from rorqual.errors import ConfigError


@dataclass(frozen=True)
class Ladder:
    """The budgets of the rungs in steps, rising; of each rung the best 1/eta go on. `goal`: what is better."""

    budgets: tuple[int, ...]
    eta: int = 3
    goal: str = "min"

    def __post_init__(self) -> None:
        if self.eta < 2:
            raise ConfigError(f"eta={self.eta}: must be 2 or more")
        if self.goal not in ("min", "max"):
            raise ConfigError(f"goal={self.goal!r}: must be 'min' or 'max'")
        rising = all(a < b for a, b in zip(self.budgets, self.budgets[1:], strict=False))
        if not self.budgets or self.budgets[0] < 1 or not rising:
            raise ConfigError(f"budgets={list(self.budgets)}: must be whole numbers from 1 that rise")

    @classmethod
    def below(cls, steps: int, eta: int = 3, rungs: int = 3, goal: str = "min") -> Ladder:
        """Rungs at steps, steps / eta, steps / eta², …: each divides the next."""
        if eta < 2:
            raise ConfigError(f"eta={eta}: must be 2 or more")
        if rungs < 1:
            raise ConfigError(f"rungs={rungs}: must be 1 or more")
        least = eta ** (rungs - 1)
        if steps % least:
            near = max(1, round(steps / least)) * least
            raise ConfigError(
                f"steps={steps}: {rungs} rungs of eta={eta} need a multiple of {least}; take steps={near}"
            )
        return cls(tuple(steps // eta**k for k in reversed(range(rungs))), eta, goal)

    @property
    def top(self) -> int:
        """The last rung."""
        return len(self.budgets) - 1

    def key(self, value: float | None) -> float:
        """Less is better; what is not finite is worst."""
        if value is None or not math.isfinite(value):
            return math.inf
        return value if self.goal == "min" else -value


@dataclass(frozen=True)
class Standing:
    """Where a trial stands: its values at the rungs that it has reached, and the highest rung it was given a place on.

    A trial on the bonus queue may have reached a rung above `place`. `out`: failed or withdrawn."""

    trial: int
    values: tuple[float | None, ...] = ()
    place: int = 0
    out: bool = False

    @property
    def reached(self) -> int:
        """How many rungs it has reached."""
        return len(self.values)


@dataclass(frozen=True)
class Promotion:
    """A trial goes on to `rung`. It was `rank`-th of `of` at the rung before; `places` is how many may go on."""

    trial: int
    rung: int
    rank: int
    of: int
    places: int
    why: str  # 'place', 'best' or 'bonus'


def due(ladder: Ladder, standings: Sequence[Standing]) -> list[Promotion]:
    """Places that are free and whom they belong to, the highest rung first."""
    found = []
    for rung in reversed(range(ladder.top)):
        there = on(ladder, standings, rung)
        places = len(there) // ladder.eta
        given = sum(s.place > rung and not (s.out and s.reached <= rung + 1) for s in standings)
        waiting = [s for s in there if _may_go_on(ladder, s, rung)]
        for s in waiting[: max(0, places - given)]:
            found.append(Promotion(s.trial, rung + 1, there.index(s) + 1, len(there), places, "place"))
    return found


def best_left(ladder: Ladder, standings: Sequence[Standing]) -> Promotion | None:
    """Where nothing else is to do: the best of a rung, if it has not gone on, does so as a guest. So a lone idea climbs,
    and the best of 28 is not lost because the 27 before it had taken the places."""
    for rung in reversed(range(ladder.top)):
        there = sorted(
            (s for s in standings if s.reached > rung and not s.out),
            key=lambda s: (ladder.key(s.values[rung]), s.trial),
        )
        if there and there[0].reached == rung + 1 and _finite(ladder, there[0], rung):
            return Promotion(there[0].trial, rung + 1, 1, len(there), len(there) // ladder.eta, "best")
    return None


def bonus(ladder: Ladder, standings: Sequence[Standing]) -> list[Promotion]:
    """Who may use a slot that would be idle, best first by the share of its rung that is better. It holds no place:
    work with a place makes it leave."""
    found = []
    for rung in range(ladder.top):
        there = sorted(
            (s for s in standings if s.reached > rung), key=lambda s: (ladder.key(s.values[rung]), s.trial)
        )
        for i, s in enumerate(there):
            if s.reached == rung + 1 and s.place <= rung and not s.out and _finite(ladder, s, rung):
                found.append((i / len(there), -rung, s.trial, i, len(there), rung))
    return [Promotion(t, r + 1, i + 1, n, n // ladder.eta, "bonus") for _, _, t, i, n, r in sorted(found)]


def on(ladder: Ladder, standings: Sequence[Standing], rung: int) -> list[Standing]:
    """Who has reached a rung with a place on it, best first; of equals, the one that came first."""
    there = [s for s in standings if s.reached > rung and s.place >= rung]
    return sorted(there, key=lambda s: (ladder.key(s.values[rung]), s.trial))


def _may_go_on(ladder: Ladder, s: Standing, rung: int) -> bool:
    return s.place == rung and not s.out and _finite(ladder, s, rung)


def _finite(ladder: Ladder, s: Standing, rung: int) -> bool:
    return ladder.key(s.values[rung]) < math.inf
