"""Sums of a few whole numbers, for small models: `12+34+56=` is answered with `46,102`, a partial sum and the total.

Only the total counts: the visible steps are the model's own to use.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Literal

from rorqual.errors import ConfigError
from rorqual.verify.answers import last_number
from rorqual.verify.outcome import RIGHT, Outcome, wrong
from rorqual.verify.tasks import Family, Problem


@dataclass(frozen=True)
class Sums(Family):
    """`terms` numbers of up to `digits` digits. Levels run through fewer terms and digits up to these."""

    terms: int = 3
    digits: int = 2
    steps: bool = True  # worked answers show the partial sums
    style: Literal["bare", "words"] = "bare"  # words: a sentence for chat models

    name: ClassVar[str] = "sums"

    def __post_init__(self) -> None:
        if not 2 <= self.terms <= 16:
            raise ConfigError(f"tasks.sums.terms={self.terms}: must be 2 to 16")
        if not 1 <= self.digits <= 12:
            raise ConfigError(f"tasks.sums.digits={self.digits}: must be 1 to 12")
        if self.terms == 2 and self.digits == 1:
            raise ConfigError(
                "tasks.sums: two terms of one digit are 55 sums, too few; raise terms or digits"
            )

    @property
    def ladder(self) -> tuple[tuple[int, int], ...]:
        """(terms, digits) of each level, the least to write first."""
        sizes = [(t, d) for t in range(2, self.terms + 1) for d in range(1, self.digits + 1)]
        return tuple(sorted((s for s in sizes if s != (2, 1)), key=lambda s: (s[0] * s[1], s[0])))

    @property
    def levels(self) -> int:
        return len(self.ladder)

    def draw(self, rng: random.Random, level: int) -> Problem:
        terms, digits = self.ladder[level]
        numbers = [rng.randrange(10**digits) for _ in range(terms)]
        totals = list(accumulate(numbers))
        shown = totals[1:] if self.steps else totals[-1:]
        if self.style == "bare":
            prompt, worked = "+".join(map(str, numbers)) + "=", ",".join(map(str, shown))
        else:
            prompt = f"What is {' + '.join(map(str, numbers))}? End with the total."
            partial = "".join(f"The sum so far is {n}. " for n in shown[:-1])
            worked = f"{partial}The answer is {shown[-1]}"
        key = "+".join(map(str, sorted(numbers)))
        return Problem(prompt, totals[-1], key, worked, {"numbers": numbers})

    def judge(self, problem: Problem, completion: str) -> Outcome:
        if self.style == "words":
            found = last_number(completion)
        elif re.fullmatch(r"[0-9]{1,20}(,[0-9]{1,20}){0,20}", completion.strip()):
            found = completion.strip().rpartition(",")[2]
        else:
            return wrong("not numbers separated by commas")
        if found is None:
            return wrong("no number")
        return RIGHT if found == str(problem.answer) else wrong(f"{found}, not {problem.answer}")
