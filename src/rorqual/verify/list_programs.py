"""Small programs on a list of numbers, carried out by the model: `[3,1,2] sort;drop 1;add 4=` gives `[6,7]`.

Worked answers show the list after each step; only the last list counts.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from rorqual.errors import ConfigError
from rorqual.verify.outcome import RIGHT, Outcome, wrong
from rorqual.verify.tasks import Family, Problem

LIST = re.compile(r"\[\s*(?:-?[0-9]{1,9}(?:\s*,\s*-?[0-9]{1,9})*)?\s*\]")

# name: (what it does with the list and the number, the range of the number or None, in words)
OPERATIONS: dict[str, tuple[Callable[[list[int], int], list[int]], tuple[int, int] | None, str]] = {
    "sort": (lambda x, k: sorted(x), None, "sort in ascending order"),
    "rev": (lambda x, k: x[::-1], None, "reverse the list"),
    "drop": (lambda x, k: x[k:], (1, 2), "drop the first {k}"),
    "take": (lambda x, k: x[:k], (2, 4), "keep only the first {k}"),
    "add": (lambda x, k: [v + k for v in x], (1, 9), "add {k} to each"),
    "sub": (lambda x, k: [v - k for v in x], (1, 9), "subtract {k} from each"),
    "mul": (lambda x, k: [v * k for v in x], (2, 4), "multiply each by {k}"),
    "even": (lambda x, k: [v for v in x if v % 2 == 0], None, "keep only even numbers"),
    "odd": (lambda x, k: [v for v in x if v % 2], None, "keep only odd numbers"),
    "over": (lambda x, k: [v for v in x if v > k], (1, 8), "keep only numbers greater than {k}"),
    "rot": (lambda x, k: x[k:] + x[:k], (1, 2), "move the first {k} to the end"),
    "uniq": (lambda x, k: list(dict.fromkeys(x)), None, "keep only the first of equal numbers"),
    "sums": (lambda x, k: [sum(x[: i + 1]) for i in range(len(x))], None, "replace each by the sum up to it"),
}  # fmt: skip


@dataclass(frozen=True)
class ListPrograms(Family):
    """Up to `steps` operations on a list of up to `length` numbers; level i has i+1 operations."""

    steps: int = 3
    length: int = 6
    largest: int = 9
    show: bool = True  # worked answers show the list after each operation
    style: Literal["bare", "words"] = "bare"

    name: ClassVar[str] = "list_programs"

    def __post_init__(self) -> None:
        for field, low, high in (("steps", 1, 12), ("length", 3, 32), ("largest", 5, 999)):
            if not low <= getattr(self, field) <= high:
                raise ConfigError(
                    f"tasks.list_programs.{field}={getattr(self, field)}: must be {low} to {high}"
                )

    @property
    def levels(self) -> int:
        return self.steps

    def draw(self, rng: random.Random, level: int) -> Problem:
        values = [rng.randint(0, self.largest) for _ in range(rng.randint(3, self.length))]
        now, shown, names, words = values, [], [], []
        for _ in range(level + 1):
            name = rng.choice(list(OPERATIONS))
            act, span, word = OPERATIONS[name]
            k = rng.randint(*span) if span else 0
            now = act(now, k)
            shown.append(_text(now))
            names.append(f"{name} {k}" if span else name)
            words.append(word.format(k=k))
        key = f"{_text(values)} {';'.join(names)}"
        if self.style == "bare":
            prompt, worked = f"{key}=", ";".join(shown if self.show else shown[-1:])
        else:
            prompt = f"Start with {_text(values)}. Then {', then '.join(words)}. End with the resulting list."
            worked = " ".join(f"{w.capitalize()}: {s}." for w, s in zip(words, shown, strict=True))
            worked = worked if self.show else f"The answer is {shown[-1]}"
        return Problem(prompt, now, key, worked)

    def judge(self, problem: Problem, completion: str) -> Outcome:
        text = completion.strip()[-10_000:]
        if self.style == "bare":
            text = text.rpartition(";")[2].strip()
            if not LIST.fullmatch(text):
                return wrong("not a list at the end")
        found = LIST.findall(text)
        if not found:
            return wrong("no list")
        values = [int(v) for v in re.findall(r"-?[0-9]+", found[-1])]
        return RIGHT if values == problem.answer else wrong(f"{_text(values)}, not {_text(problem.answer)}")


def _text(values: list[int]) -> str:
    return f"[{','.join(map(str, values))}]"
