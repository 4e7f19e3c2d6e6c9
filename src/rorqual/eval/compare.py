"""Two results on the same problems: the difference with its interval and a paired test."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rorqual.errors import DataError

FLIPS = 10_000  # sign flips of the permutation test


@dataclass(frozen=True)
class Difference:
    """`b` against `a` on one task or text. `p` is two-sided: how often chance alone does as much."""

    what: str
    a: float
    b: float
    low: float  # of b - a, 95%
    high: float
    p: float
    pairs: int


def read(path: Path) -> dict[str, Any]:
    """A result file. Raises DataError where it is none."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise DataError(f"{path.resolve()}: {e.strerror}") from e
    except ValueError as e:
        raise DataError(f"{path.resolve()}: not JSON ({e})") from e
    if not isinstance(result, dict) or result.get("kind") != "rorqual eval":
        raise DataError(f"{path.resolve()}: not a result of `rorqual eval MODEL --out FILE`")
    return result


def compare(a: dict[str, Any], b: dict[str, Any]) -> list[Difference]:
    """Every task and text that both have. Raises DataError where there is none or the problems differ."""
    found = []
    for kind, label in (("tasks", "task"), ("texts", "text")):
        others = {row[label]: row for row in b[kind]}
        for row in a[kind]:
            other = others.get(row[label])
            if other is None:
                continue
            if other["fingerprint"] != row["fingerprint"]:
                raise DataError(
                    f"{label} {row[label]}: the two results are not of the same problems and settings; evaluate "
                    "both models with the same options"
                )
            found.append(_accuracy(row, other) if kind == "tasks" else _bits(row, other))
    if not found:
        raise DataError("the two results have no task and no text in common")
    return found


def _accuracy(a: dict[str, Any], b: dict[str, Any]) -> Difference:
    pairs = [
        (ra / ja, rb / jb)
        for ra, ja, rb, jb in zip(a["right"], a["judged"], b["right"], b["judged"], strict=True)
        if ja and jb
    ]
    if not pairs:
        raise DataError(f"task {a['task']}: no problem was judged in both results")
    differences = [y - x for x, y in pairs]
    binary = all(x in (0, 1) and y in (0, 1) for x, y in pairs)
    better, worse = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    p = sign_test(better, worse) if binary else flip_test(differences)
    n = len(pairs)
    low, high = _interval(differences)
    return Difference(a["task"], sum(x for x, _ in pairs) / n, sum(y for _, y in pairs) / n, low, high, p, n)


def _bits(a: dict[str, Any], b: dict[str, Any]) -> Difference:
    pairs = [
        (x / m, y / n)
        for x, m, y, n in zip(a["bits"], a["byte_counts"], b["bits"], b["byte_counts"], strict=True)
        if m and n
    ]
    differences = [y - x for x, y in pairs]
    low, high = _interval(differences)
    p = flip_test(differences)
    return Difference(
        f"{a['text']} (bits/byte)", a["bits_per_byte"], b["bits_per_byte"], low, high, p, len(pairs)
    )


def sign_test(better: int, worse: int) -> float:
    """McNemar's exact test: two-sided binomial over the problems on which the two differ."""
    n = better + worse
    tail = sum(math.comb(n, i) for i in range(min(better, worse) + 1))
    return min(1.0, 2 * tail / 2**n)


def flip_test(differences: Sequence[float]) -> float:
    """Two-sided permutation test: the signs of the differences are flipped at random (fixed seed)."""
    seen = abs(sum(differences))
    if seen == 0:
        return 1.0
    rng = random.Random(0)
    sizes = [abs(d) for d in differences]
    hits = sum(abs(sum(s if rng.random() < 0.5 else -s for s in sizes)) >= seen - 1e-12 for _ in range(FLIPS))
    return (hits + 1) / (FLIPS + 1)


def _interval(differences: Sequence[float]) -> tuple[float, float]:
    n = len(differences)
    mean = sum(differences) / n
    half = 1.96 * math.sqrt(sum((d - mean) ** 2 for d in differences) / max(n - 1, 1) / n)
    return mean - half, mean + half
