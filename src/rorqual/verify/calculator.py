"""A calculator for models that call one: arithmetic, and how often a text occurs in another. No eval.

>>> calculate("3*(2+1)"), calculate("'strawberry'.count('r')")
('9', '3')
"""

from __future__ import annotations

import re

from rorqual.errors import ConfigError
from rorqual.verify.expression import ParseError, parse, rational

COUNT = re.compile(r"""\s*(['"])([^'"\\]{0,500})\1\s*\.\s*count\(\s*(['"])([^'"\\]{1,100})\3\s*\)\s*""")


def calculate(expression: str) -> str:
    """The value as a whole number, a short decimal or a fraction. Raises ConfigError for anything else."""
    count = COUNT.fullmatch(expression)
    if count:
        return str(count[2].count(count[4]))
    try:
        value = rational(parse(expression))
    except ParseError as e:
        raise ConfigError(
            f"calculator: {expression[:60]!r}: {e}; numbers, + - * / ^ and brackets only"
        ) from e
    if value is None:
        raise ConfigError(f"calculator: {expression[:60]!r}: not arithmetic, or too large")
    if value.denominator == 1:
        return str(value.numerator)
    scaled = value * 10**12
    return f"{float(value):.12g}" if scaled.denominator == 1 else str(value)
