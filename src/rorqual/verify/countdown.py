"""Countdown: an expression of the given numbers that makes the target. `3 7 25 -> 88:` is answered with
`25-3=22,22*4...` steps or none and, last, the whole expression. Many answers are right; our own checker decides.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

from rorqual.errors import ConfigError
from rorqual.verify.answers import extract
from rorqual.verify.outcome import RIGHT, Outcome, wrong
from rorqual.verify.tasks import Family, Problem

MAX_EXPRESSION = 200  # characters
TOKEN = re.compile(r"\s*([0-9]{1,9}|[-+*/()])")
SIGNS = {"×": "*", "·": "*", "÷": "/", "−": "-", "\\times": "*", "\\div": "/", "\\cdot": "*"}


@dataclass(frozen=True)
class Countdown(Family):
    """Each of `numbers` numbers up to `largest` is used exactly once. Levels run from two numbers to these."""

    numbers: int = 3
    largest: int = 25
    most: int = 100  # the largest target
    operators: str = "+-*"
    steps: bool = True  # worked answers show what is computed on the way
    style: Literal["bare", "words"] = "bare"

    name: ClassVar[str] = "countdown"

    def __post_init__(self) -> None:
        if not 2 <= self.numbers <= 6:
            raise ConfigError(f"tasks.countdown.numbers={self.numbers}: must be 2 to 6")
        if self.largest < 9 or self.most < 10:
            raise ConfigError(f"tasks.countdown.largest={self.largest}, most={self.most}: at least 9 and 10")
        if not self.operators or set(self.operators) - set("+-*/"):
            raise ConfigError(f"tasks.countdown.operators={self.operators!r}: some of +-*/")

    @property
    def levels(self) -> int:
        return self.numbers - 1

    def draw(self, rng: random.Random, level: int) -> Problem:
        while True:
            numbers = [rng.randint(1, self.largest) for _ in range(level + 2)]
            target, expression, steps = self._combine(rng, numbers)
            if target.denominator == 1 and 1 <= target <= self.most and target not in numbers:
                break
        shuffled = sorted(numbers)
        rng.shuffle(shuffled)
        listed = " ".join(map(str, shuffled))
        answer = _bare(expression)
        if self.style == "bare":
            prompt = f"{listed} -> {target}:"
            worked = ",".join([*steps, answer]) if self.steps else answer
        else:
            prompt = (
                f"Use each of the numbers {', '.join(map(str, shuffled))} exactly once, with {' '.join(self.operators)} "
                f"and brackets, to make {target}. End with 'The answer is' and the expression."
            )
            worked = f"{'. '.join(steps) + '. ' if self.steps else ''}The answer is {answer}"
        key = f"{sorted(numbers)} {target}"
        return Problem(prompt, int(target), key, worked, {"numbers": shuffled})

    def _combine(self, rng: random.Random, numbers: list[int]) -> tuple[Fraction, str, list[str]]:
        """Numbers joined two by two at random: the value, its expression and the steps."""
        parts = [(Fraction(n), str(n)) for n in numbers]
        steps = []
        while len(parts) > 1:
            (a, left), (b, right) = (parts.pop(rng.randrange(len(parts))) for _ in range(2))
            operator = rng.choice(self.operators)
            if operator == "-" and a < b:
                (a, left), (b, right) = (b, right), (a, left)
            if operator == "/" and (b == 0 or (a / b).denominator != 1):
                operator = self.operators[0] if self.operators != "/" else "/"
                if operator == "/":
                    return Fraction(0), "0", []
            value = {"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else Fraction(0)}[operator]
            steps.append(f"{a}{operator}{b}={value}")
            parts.append((value, f"({left}{operator}{right})"))
        return parts[0][0], parts[0][1], steps

    def judge(self, problem: Problem, completion: str) -> Outcome:
        if self.style == "bare":
            text = completion.strip().rpartition(",")[2]
        else:
            found = extract(completion)
            if found is None:
                return wrong("no answer")
            text = found
        for sign, plain in SIGNS.items():
            text = text.replace(sign, plain)
        left, equals, right = text.partition("=")
        if equals and right.strip() != str(problem.answer):
            return wrong("says that it equals something else")
        try:
            value, used = evaluate(left, self.operators)
        except ValueError as e:
            return wrong(str(e))
        if Counter(used) != Counter(problem.meta["numbers"]):
            return wrong("not each of the numbers once")
        return RIGHT if value == problem.answer else wrong(f"makes {value}, not {problem.answer}")


def evaluate(text: str, operators: str = "+-*/") -> tuple[Fraction, list[int]]:
    """Value and numbers of an expression of whole numbers, exactly. Raises ValueError for anything else."""
    if len(text) > MAX_EXPRESSION:
        raise ValueError("too long")
    tokens, at = [], 0
    text = text.strip()
    while at < len(text):
        match = TOKEN.match(text, at)
        if match is None:
            raise ValueError("not an expression")
        tokens.append(match[1])
        at = match.end()
    used: list[int] = []
    value, rest = _sum(tokens, 0, used, operators)
    if rest != len(tokens):
        raise ValueError("not an expression")
    return value, used


def _sum(tokens: list[str], at: int, used: list[int], operators: str) -> tuple[Fraction, int]:
    value, at = _product(tokens, at, used, operators)
    while at < len(tokens) and tokens[at] in "+-":
        operator = _allowed(tokens[at], operators)
        other, at = _product(tokens, at + 1, used, operators)
        value = value + other if operator == "+" else value - other
    return value, at


def _product(tokens: list[str], at: int, used: list[int], operators: str) -> tuple[Fraction, int]:
    value, at = _atom(tokens, at, used, operators)
    while at < len(tokens) and tokens[at] in "*/":
        operator = _allowed(tokens[at], operators)
        other, at = _atom(tokens, at + 1, used, operators)
        if operator == "/" and other == 0:
            raise ValueError("division by zero")
        value = value * other if operator == "*" else value / other
    return value, at


def _atom(tokens: list[str], at: int, used: list[int], operators: str) -> tuple[Fraction, int]:
    if at >= len(tokens):
        raise ValueError("not an expression")
    if tokens[at] == "(":
        value, at = _sum(tokens, at + 1, used, operators)
        if at >= len(tokens) or tokens[at] != ")":
            raise ValueError("not an expression")
        return value, at + 1
    if not tokens[at].isdigit():
        raise ValueError("not an expression")
    used.append(int(tokens[at]))
    return Fraction(used[-1]), at + 1


def _allowed(operator: str, operators: str) -> str:
    if operator not in operators:
        raise ValueError(f"{operator} is not allowed")
    return operator


def _bare(expression: str) -> str:
    """Without the outermost brackets."""
    return expression[1:-1] if expression.startswith("(") else expression
