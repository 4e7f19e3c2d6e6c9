"""Promotion, as arithmetic on who stands where."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rorqual.errors import ConfigError
from rorqual.lab.rungs import Ladder, Standing, best_left, bonus, due

LADDER = Ladder((1, 3, 9))


def test_rungs_below_a_number_of_steps_divide_it() -> None:
    assert Ladder.below(270, 3, 3).budgets == (30, 90, 270)
    with pytest.raises(ConfigError, match="take steps=99"):
        Ladder.below(100, 3, 3)


def test_the_best_third_of_those_that_came_go_on() -> None:
    """Six at the first rung: two places; the values 1 and 2 get them."""
    there = [Standing(i, (float(v),)) for i, v in enumerate((5, 1, 4, 2, 6, 3))]
    assert [(p.trial, p.rung, p.rank, p.of, p.places) for p in due(LADDER, there)] == [
        (1, 1, 1, 6, 2),
        (3, 1, 2, 6, 2),
    ]


def test_a_place_that_is_given_is_not_given_again() -> None:
    """Worst first: at six, two places; one was given at three to the best of then."""
    there = [Standing(i, (float(9 - i),), place=int(i == 2)) for i in range(6)]
    assert [p.trial for p in due(LADDER, there)] == [5]


def test_fewer_than_eta_have_no_place() -> None:
    assert due(LADDER, [Standing(0, (1.0,)), Standing(1, (2.0,))]) == []


def test_the_highest_rung_comes_first() -> None:
    there = [Standing(i, (float(i), float(i)), place=1) for i in range(3)]
    there += [Standing(i, (float(i),)) for i in range(3, 12)]
    assert [(p.trial, p.rung) for p in due(LADDER, there)] == [(0, 2), (3, 1)]


@pytest.mark.parametrize("worst", [math.nan, math.inf, None])
def test_what_is_not_finite_is_never_promoted(worst: float | None) -> None:
    there = [Standing(i, (worst,)) for i in range(6)]
    assert due(LADDER, there) == []
    assert best_left(LADDER, there) is None
    assert bonus(LADDER, there) == []
    assert [p.trial for p in due(LADDER, [*there, Standing(6, (99.0,))])] == [6]


def test_where_more_is_better() -> None:
    there = [Standing(i, (float(i),)) for i in range(3)]
    assert [p.trial for p in due(Ladder((1, 3), goal="max"), there)] == [2]


def test_the_place_of_one_that_failed_on_its_way_is_given_to_another() -> None:
    there = [Standing(0, (1.0,), place=1, out=True), Standing(1, (2.0,)), Standing(2, (3.0,))]
    assert [p.trial for p in due(LADDER, there)] == [1]


def test_a_lone_idea_climbs_when_nothing_else_is_to_do() -> None:
    lone = [Standing(0, (1.0,))]
    assert due(LADDER, lone) == []
    assert best_left(LADDER, lone) is not None
    assert best_left(LADDER, [Standing(0, (1.0, 1.0, 1.0), place=2)]) is None


def test_the_best_of_all_is_not_lost_because_the_places_were_taken() -> None:
    there = [Standing(i, (float(i + 1),), place=1) for i in range(9)]
    there += [Standing(i, (float(i + 1),)) for i in range(9, 27)] + [Standing(27, (0.0,))]
    assert due(LADDER, there) == []
    found = best_left(LADDER, there)
    assert found is not None
    assert (found.trial, found.why) == (27, "best")


def test_an_idle_slot_goes_to_the_best_who_waits_and_holds_no_place() -> None:
    there = [Standing(0, (1.0,), place=1), Standing(1, (2.0,)), Standing(2, (3.0,))]
    assert [p.trial for p in bonus(LADDER, there)] == [1, 2]
    guest = Standing(1, (2.0, 2.0))  # it has run there since
    assert len(due(LADDER, [Standing(0, (1.0, 1.0), place=1), guest])) == 0


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=40), st.integers(2, 4), st.randoms(use_true_random=False)
)
def test_there_are_never_more_places_than_a_share(
    values: list[float], eta: int, randomly: random.Random
) -> None:
    """In whatever order they come and are promoted: places on rung k + 1 are at most n_k // eta, and where nobody
    waits for a value, exactly that."""
    ladder = Ladder((1, 2, 4), eta)
    there: dict[int, Standing] = {}
    coming = list(enumerate(values))
    while True:
        found = due(ladder, list(there.values()))
        if found and (not coming or randomly.random() < 0.5):
            p = found[0]
            s = there[p.trial]
            assert s.place == p.rung - 1
            there[p.trial] = Standing(s.trial, (*s.values, s.values[0]), p.rung)
        elif coming:
            trial, value = coming.pop()
            there[trial] = Standing(trial, (value,))
        else:
            break
        for rung in range(2):
            reached = sum(s.reached > rung for s in there.values())
            assert sum(s.place > rung for s in there.values()) <= reached // eta
    for rung in range(2):
        reached = sum(s.reached > rung for s in there.values())
        assert sum(s.place > rung for s in there.values()) == reached // eta
