"""Rates are pure functions of the step."""

import pytest

from rorqual.errors import ConfigError
from rorqual.train.config import Schedule
from rorqual.train.schedule import rate


def test_warmup_plateau_cooldown_by_hand() -> None:
    s = Schedule(warmup=0.1, cooldown=0.5, floor=0.0)
    got = [rate(s, step, 20) for step in range(20)]
    assert got[:2] == [0.5, 1.0]
    assert got[2:11] == [1.0] * 9
    assert got[11:] == pytest.approx([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_cosine_by_hand() -> None:
    s = Schedule("cosine", warmup=0.0, floor=0.1)
    assert rate(s, 0, 100) == 1.0
    assert rate(s, 50, 100) == pytest.approx(0.55)
    assert rate(s, 100, 100) == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", [Schedule(), Schedule("cosine")])
def test_every_rate_is_above_zero_and_at_most_one(schedule: Schedule) -> None:
    for steps in (1, 2, 7, 100):
        assert all(0 < rate(schedule, step, steps) <= 1 for step in range(steps))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"warmup": 0.6, "cooldown": 0.5}, "overlap"),
        ({"warmup": 1.5}, "schedule.warmup=1.5"),
        ({"floor": -0.1}, "schedule.floor=-0.1"),
        ({"name": "cosine", "cooldown": 0.2}, "schedule.cooldown=0.2"),
    ],
)
def test_contradictions_are_refused(fields: dict, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        Schedule(**fields)
