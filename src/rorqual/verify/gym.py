"""Families of reasoning-gym, behind a strict wrapper.

Only families are let in whose scorers were found sound and in which no constant answer earns anything. The answer
is extracted first, by our rules; then it must earn the full score, or it earns nothing. A scorer that raises has
failed, and the completion is not blamed. Scorers that evaluate an answer as an expression are not called at all:
for those families (countdown) there are our own.
"""

from __future__ import annotations

import hashlib
import random
import re
import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

from rorqual.errors import ConfigError
from rorqual.verify.answers import extract, last_number
from rorqual.verify.outcome import RIGHT, Outcome, wrong
from rorqual.verify.tasks import Family, Problem

MAX_ANSWER = 300  # characters

# family: its levels, as options of reasoning-gym's own configuration, the easiest first
FAMILIES: dict[str, tuple[dict[str, Any], ...]] = {
    "chain_sum": (
        {"min_terms": 2, "max_terms": 2, "max_digits": 2},
        {"min_terms": 2, "max_terms": 3, "max_digits": 2},
        {"min_terms": 3, "max_terms": 4, "max_digits": 3},
        {"min_terms": 2, "max_terms": 6, "max_digits": 4},
    ),
    "basic_arithmetic": (
        {
            "max_terms": 2,
            "max_digits": 2,
            "operators": ["+", "-"],
            "allow_parentheses": False,
            "allow_negation": False,
        },
        {"max_terms": 3, "max_digits": 2, "operators": ["+", "-", "*"], "allow_negation": False},
        {"max_terms": 5, "max_digits": 3},
    ),
    "products": (
        {"min_digits": 2, "max_digits": 2},
        {"min_digits": 2, "max_digits": 3},
        {"min_digits": 2, "max_digits": 5},
    ),
    "gcd": ({"max_value": 100}, {"max_value": 1000}, {"max_numbers": 3, "max_value": 5000}),
    "lcm": ({"max_value": 50}, {"max_value": 100}, {"max_numbers": 3, "max_value": 100}),
    "fraction_simplification": (
        {"max_value": 30, "max_factor": 10, "styles": ["plain"]},
        {"max_value": 1000, "max_factor": 100, "styles": ["plain"]},
    ),
    "simple_equations": (
        {"min_terms": 2, "max_terms": 2, "max_value": 30, "operators_weights": [0.5, 0.5, 0.0]},
        {"max_terms": 3},
        {"max_terms": 4},
    ),
    "number_sequence": ({"max_complexity": 1}, {"max_complexity": 2}, {"max_complexity": 3}),
    "gsm_symbolic": ({},),
    # from 1: its answer for 0 is the empty text
    "base_conversion": (
        {"max_base": 4, "min_value": 1, "max_value": 100},
        {"min_value": 1, "max_value": 200},
        {"min_value": 1, "max_value": 1000},
    ),
    "letter_counting": ({"min_words": 3, "max_words": 5}, {"min_words": 5, "max_words": 15}),
    "spell_backward": ({"max_word_len": 5}, {"min_word_len": 4, "max_word_len": 10}),
    "word_sorting": ({"min_words": 3, "max_words": 4}, {"min_words": 3, "max_words": 10}),
    "family_relationships": ({"max_family_size": 5}, {"max_family_size": 8}),
    "knights_knaves": ({"n_people": 2}, {"n_people": 3}),
}
NUMBERS = {
    *("chain_sum", "basic_arithmetic", "products", "gcd", "lcm"),
    *("simple_equations", "number_sequence", "gsm_symbolic", "letter_counting"),
}
_lock = threading.Lock()  # drawing sets a data set's seed


@dataclass(frozen=True)
class Gym(Family):
    """One family of reasoning-gym."""

    family: str = "chain_sum"

    name: ClassVar[str] = "gym"

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ConfigError(
                f"tasks.gym.family={self.family!r}: not one of those with a sound scorer: {', '.join(FAMILIES)}"
            )

    @property
    def levels(self) -> int:
        return len(FAMILIES[self.family])

    def draw(self, rng: random.Random, level: int) -> Problem:
        with _lock:
            dataset = _dataset(self.family, level)
            dataset.seed = rng.getrandbits(31)
            state = random.getstate()  # some families draw from the global generator as well
            random.seed(dataset.seed)
            try:
                entry = dataset[0]
            finally:
                random.setstate(state)
        question, answer = entry["question"].strip(), str(entry["answer"])
        key = f"{self.family} {hashlib.sha256(' '.join(question.split()).encode()).hexdigest()}"
        prompt = f"{question}\nEnd with 'The answer is' and the answer alone."
        worked = f"<answer>{answer}</answer>"
        return Problem(prompt, answer, key, worked, {"entry": entry, "level": level})

    def judge(self, problem: Problem, completion: str) -> Outcome:
        found = extract(completion)
        if found is None and self.family in NUMBERS:
            found = last_number(completion)
        if found is None:
            return wrong("no answer")
        if len(found) > MAX_ANSWER:
            return wrong("an answer too long")
        if self.family in NUMBERS:
            number = last_number(found)
            if number is None or re.fullmatch(r"[-+$\s\u2212]*[0-9][0-9,.]*%?", found) is None:
                return wrong("not a number")
            found = number
        if found == problem.answer:
            return RIGHT
        score = _dataset(self.family, problem.meta["level"]).score_answer(found, entry=problem.meta["entry"])
        return RIGHT if score == 1.0 else wrong(f"{found[:80]}, not {problem.answer[:80]}")


@lru_cache(maxsize=64)
def _dataset(family: str, level: int) -> Any:
    try:
        import reasoning_gym
    except ImportError as e:
        raise ConfigError("task gym: needs reasoning-gym; pip install 'rorqual[rl]'") from e
    return reasoning_gym.create_dataset(family, size=1, seed=0, **FAMILIES[family][level])
