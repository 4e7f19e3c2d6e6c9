"""What a verifier says of a completion: right, wrong, or that the verifier itself failed. Never two of them in one.

A grader that failed (its own fault, a lost process, a timeout that was not the completion's) must not be read
as "wrong": such a completion is left out of rewards, group statistics and accuracy, and is counted apart.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Verdict(Enum):
    """The three values of a verdict."""

    RIGHT = "right"
    WRONG = "wrong"
    GRADER_FAILED = "grader_failed"


@dataclass(frozen=True)
class Outcome:
    """A verdict and why. Not usable as a truth value: ask for `reward`, `is_right` or `verdict`."""

    verdict: Verdict
    reason: str = ""

    @property
    def is_right(self) -> bool:
        return self.verdict is Verdict.RIGHT

    @property
    def grader_failed(self) -> bool:
        return self.verdict is Verdict.GRADER_FAILED

    @property
    def reward(self) -> float | None:
        """1.0 right, 0.0 wrong, None where the grader failed: leave the completion out."""
        return {Verdict.RIGHT: 1.0, Verdict.WRONG: 0.0, Verdict.GRADER_FAILED: None}[self.verdict]

    def __bool__(self) -> bool:
        raise TypeError("an Outcome has three values: compare .verdict, or use .is_right or .reward")


RIGHT = Outcome(Verdict.RIGHT)


def wrong(reason: str) -> Outcome:
    """A verdict against the completion."""
    return Outcome(Verdict.WRONG, reason)


def grader_failed(reason: str) -> Outcome:
    """No verdict: the fault is the verifier's."""
    return Outcome(Verdict.GRADER_FAILED, reason)
