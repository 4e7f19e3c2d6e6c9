"""Task streams: endless, the same everywhere, training and held-out disjoint; three outcomes, never two."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rorqual.errors import ConfigError
from rorqual.verify import tasks
from rorqual.verify.outcome import RIGHT, Verdict, grader_failed, wrong
from rorqual.verify.tasks import TASKS

NAMES = sorted(TASKS)


@pytest.mark.parametrize("name", NAMES)
def test_a_problem_is_a_function_of_seed_and_index(name: str) -> None:
    one, other = tasks.create(name), tasks.create(name)
    for level in range(one.levels):
        assert one.make(3, 5, level) == other.make(3, 5, level)
        assert one.make(3, 5, level) != one.make(3, 6, level)


@pytest.mark.parametrize("name", NAMES)
def test_training_and_held_out_share_no_problem(name: str) -> None:
    task = tasks.create(name)
    for level in {0, task.levels - 1}:
        train = {task.make(seed, i, level).key for seed in (0, 1) for i in range(30)}
        held = {task.make(seed, i, level, "held_out").key for seed in (0, 1) for i in range(15)}
        assert train
        assert held
        assert not train & held


@pytest.mark.parametrize("name", NAMES)
def test_the_worked_answer_is_right_and_others_are_wrong(name: str) -> None:
    task = tasks.create(name)
    for level in range(task.levels):
        problem = task.make(1, 2, level)
        assert problem.worked is not None
        assert task.grade(problem, problem.worked).verdict is Verdict.RIGHT, problem
        for text in ("", "banana", "0", "{}", "\\boxed{", "I do not know.", "\x00", "<answer>"):
            assert task.grade(problem, text).verdict is Verdict.WRONG, (problem, text)


def test_another_process_makes_the_same_problems() -> None:
    code = "from rorqual.verify import tasks; print(repr(tasks.create('sums').make(7, 11).prompt))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == repr(tasks.create("sums").make(7, 11).prompt)


def test_an_outcome_has_three_values() -> None:
    assert (RIGHT.reward, wrong("x").reward, grader_failed("x").reward) == (1.0, 0.0, None)
    with pytest.raises(TypeError, match="three values"):
        bool(RIGHT)


def test_a_fault_of_the_grader_is_not_the_completions() -> None:
    """huggingface/OpenEnv#965: a missing reward read as 0 blames the model."""
    task = tasks.create("sums")
    problem = task.make(0, 0)
    object.__setattr__(problem, "answer", None)
    broken = type("Broken", (type(task),), {"judge": lambda self, p, c: 1 / 0})()
    assert broken.grade(problem, "1,2").verdict is Verdict.GRADER_FAILED
    assert broken.grade(problem, "1,2").reward is None


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sum", {}, "unknown"),
        ("sums", {"term": 3}, "did you mean 'terms'"),
        ("sums", {"terms": 1}, "terms=1"),
        ("sums", {"digits": "two"}, "whole number"),
        ("sums", {"style": "verse"}, "style"),
    ],
)
def test_what_does_not_exist_is_named(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        tasks.create(name, **options)


def test_a_level_or_split_that_is_not_there_is_refused() -> None:
    task = tasks.create("sums")
    with pytest.raises(ConfigError, match="difficulty=99"):
        task.make(0, 0, 99)
    with pytest.raises(ConfigError, match="split='test'"):
        task.make(0, 0, None, "test")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("46,102", True),
        ("102", True),
        ("46, 102", False),
        ("102,46", False),
        ("102x", False),
        ("１０２", False),
        ("1e2", False),
    ],
)
def test_only_the_total_of_a_sum_counts(completion: str, right: bool) -> None:
    task = tasks.create("sums")
    problem = tasks.Problem("12+34+56=", 102, "12+34+56")
    assert task.grade(problem, completion).is_right is right
