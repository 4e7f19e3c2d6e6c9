"""Power laws recovered from points that obey one; the held-back rung judges the fit."""

import random
from math import log
from types import SimpleNamespace

import pytest

from rorqual.compare.budget import Budget
from rorqual.compare.command import scaling
from rorqual.compare.scaling import Ladder, fit, gains, ladder, summary
from rorqual.compare.study import Match, Point
from rorqual.errors import ConfigError


def law(flops: float, factor: float = 1.0) -> float:
    return 20 * (flops * factor) ** -0.05


def rungs(name: str, factor: float, top: float = 0.0) -> Ladder:
    points = []
    for i, c in enumerate((1e11, 2e11, 4e11, 8e11)):
        results = tuple(
            SimpleNamespace(flops=c, loss=law(c, factor) * (1 + 0.001 * s) + (top if i == 3 else 0))
            for s in (-1, 1)
        )
        points.append(Point(name, 100 * i + 100, results))  # type: ignore[arg-type]
    return Ladder(name, tuple(points))


def test_a_law_is_recovered_and_predicts() -> None:
    found = fit([(c, law(c)) for c in (1e10, 1e11, 1e12)])
    assert (found.a, found.b) == (pytest.approx(log(20)), pytest.approx(-0.05))
    assert found.predict(1e14)[0] == pytest.approx(law(1e14))


def test_intervals_cover_new_runs_about_as_often_as_they_say() -> None:
    """95% intervals of noisy fits, 2,000 draws from a fixed seed: coverage within 2% of it."""
    rng = random.Random(0)
    held = 0
    for _ in range(2000):
        noisy = [(c, law(c) * 2.718281828 ** rng.gauss(0, 0.01)) for c in (1e10, 3e10, 1e11, 3e11, 1e12)]
        _, low, high = fit(noisy).predict(1e13)
        held += low <= law(1e13) * 2.718281828 ** rng.gauss(0, 0.01) <= high
    assert abs(held / 2000 - 0.95) < 0.02


def test_the_held_back_rung_judges_the_law() -> None:
    assert rungs("a", 1).verdict["held"]
    assert not rungs("a", 1, top=0.5).verdict["held"]
    assert "OUTSIDE" in summary([rungs("a", 1, top=0.5)], [])[0]


def test_measured_factors_come_before_the_fits() -> None:
    base, less, least = rungs("baseline", 1).points[2], *reversed(rungs("recipe", 4).points[:2])
    cost = {"tokens": 1, "cpu_seconds": 1.0, "peak_bytes": 1}
    for point in (base, less, least):
        for result in point.results:
            vars(result).update(cost)
    both = [Match(base, (less, least), least), Match(base, (less,), None)]
    lines = summary([rungs("a", 1)], both)
    assert "4.00x fewer FLOPs" in lines[0]
    assert "does not reach it" in lines[1]
    assert lines[2].startswith("a: loss falls")


def test_gains_are_read_off_the_other_law() -> None:
    found = gains(rungs("base", 1), rungs("recipe", 4))
    assert [f for _, f in found] == pytest.approx([4.0] * 5, rel=0.01)


def test_ladders_keep_tokens_per_weight() -> None:
    found = ladder(Budget(width=32, steps=400), 3, 1.41)
    assert [(b.width, b.steps) for b in found] == [(32, 400), (48, 900), (64, 1600)]


def test_a_ladder_of_two_is_refused() -> None:
    with pytest.raises(ConfigError, match="--rungs 2"):
        scaling(["--rungs", "2"])
