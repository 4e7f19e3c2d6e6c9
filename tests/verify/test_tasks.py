"""Task streams: endless, the same everywhere, training and held-out disjoint; three outcomes, never two."""

from __future__ import annotations

import subprocess
import sys

import pytest

from rorqual.errors import ConfigError
from rorqual.verify import tasks
from rorqual.verify.gym import FAMILIES, _dataset
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


def test_a_held_out_set_holds_no_problem_twice_and_a_small_family_whole() -> None:
    """Of 256 draws of the first level of functions 15 differ: an accuracy has no more to rest on."""
    functions = tasks.create("functions", style="continue", examples=0)
    drawn = {functions.make(5, i, 0, "held_out").prompt for i in range(256)}
    assert {p.prompt for p in tasks.held_out(functions, 256, 1234, 0)} == drawn
    sums = tasks.create("sums", digits=3)
    problems = tasks.held_out(sums, 40, 0)
    assert len({p.key for p in problems}) == 40
    assert problems[0] == sums.make(0, 0, None, "held_out")


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


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_of_reasoning_gym_gives_nothing_for_constants_or_junk(family: str) -> None:
    """Its scorers pay up to 0.97 for constants and answers in a sentence; here it is the whole answer or nothing."""
    task = tasks.create("gym", family=family)
    for level in range(task.levels):
        problems = [task.make(5, i, level) for i in range(6)]
        assert all(task.grade(p, p.worked or "").is_right for p in problems)
        assert all(task.grade(p, f"The answer is {p.answer}").is_right for p in problems[:2])
        for text in (
            "banana",
            "{}",
            "0",
            "<answer>",
            "\\boxed{}",
            "<answer>1e999999999</answer>",
            "9" * 5000,
        ):
            outcomes = [task.grade(p, text).verdict for p in problems]
            assert Verdict.GRADER_FAILED not in outcomes
            assert outcomes.count(Verdict.RIGHT) <= sum(p.answer == text for p in problems)


def test_a_scorer_that_pays_for_anything_is_not_let_in() -> None:
    """Every string scores 1.0 in game_of_life_halting; a constant earns 0.97 in coin_flip."""
    for family in ("game_of_life_halting", "coin_flip", "countdown", "boxnet"):
        with pytest.raises(ConfigError, match="sound scorer"):
            tasks.create("gym", family=family)


def test_a_scorer_that_raises_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    """prime_factorization raises ValueError on any non-number."""
    task = tasks.create("gym", family="word_sorting")
    problem = task.make(0, 0)

    def fail(*_: object, **__: object) -> float:
        raise ValueError("bad scorer")

    monkeypatch.setattr(type(_dataset("word_sorting", 1)), "score_answer", fail)
    assert task.grade(problem, "<answer>a, b</answer>").grader_failed


@pytest.mark.parametrize(
    ("completion", "right"),
    [
        ("(25-3)*4", True),
        ("25-3=22,22*4=88,(25-3)*4", True),
        ("(25 - 3) × 4 = 88", True),
        ("25*4-3*4", False),  # 4 twice
        ("88", False),
        ("(25-3)*4=87", False),
        ("25-3=22,22*4=88", False),  # the steps alone: 22 is not given
        ("(25-3)*4*1", False),
        ("(25-3)*2**2", False),
        ("__import__('os').system('x')", False),
        ("(" * 150, False),
        ("9**9**9**9", False),
        ("25-3)*4", False),
        ("４*(25-3)", False),
    ],
)
def test_countdown_is_checked_by_computing(completion: str, right: bool) -> None:
    problem = tasks.Problem("3 4 25 -> 88:", 88, "", None, {"numbers": [3, 4, 25]})
    outcome = tasks.create("countdown").grade(problem, completion)
    assert outcome.verdict is (Verdict.RIGHT if right else Verdict.WRONG), outcome


@pytest.mark.parametrize(
    ("completion", "right"),
    [("[6,7]", True), ("[2,3];[6, 7]", True), ("[6,7];", False), ("[6,7,8]", False), ("6,7", False)],
)
def test_only_the_last_list_counts(completion: str, right: bool) -> None:
    problem = tasks.Problem("", [6, 7], "")
    assert tasks.create("list_programs").grade(problem, completion).is_right is right


@pytest.mark.parametrize("style", ["chat", "continue"])
def test_every_function_template_is_solved_by_its_reference(style: str) -> None:
    task = tasks.create("functions", style=style)
    problems = [task.make(seed, i, level) for level in range(3) for seed in (0, 1) for i in range(20)]
    assert all(o.is_right for o in tasks.grade_all(task, [(p, p.worked or "") for p in problems]))
    assert len({p.meta["entry"] for p in problems}) >= 30
    constant = [(p, "```python\n" + p.meta["stub"] + "    return 0\n```") for p in problems]
    hollow = [(p, "    return None\n") for p in problems]
    for outcome in tasks.grade_all(task, constant if style == "chat" else hollow):
        assert outcome.verdict is Verdict.WRONG


def test_the_examples_of_a_function_are_not_its_tests() -> None:
    task = tasks.create("functions")
    problem = task.make(0, 3)
    entry = problem.meta["entry"]
    assert problem.prompt.count(f">>> {entry}(") == 2
    assert all(
        f">>> {entry}({', '.join(map(repr, c))})\n" not in problem.prompt for c in problem.meta["calls"]
    )


def test_a_function_without_examples() -> None:
    task = tasks.create("functions", style="continue", examples=0)
    problem = task.make(0, 3)
    assert ">>>" not in problem.prompt
    assert problem.prompt.count("\n") == 2
    assert len(problem.meta["calls"]) == 8
    assert task.grade(problem, problem.worked or "").is_right
    with pytest.raises(ConfigError, match="examples=3"):
        tasks.create("functions", examples=3)


def test_words_and_bare_styles_hold_the_same_problems() -> None:
    for name in ("sums", "countdown", "list_programs"):
        bare, words = tasks.create(name), tasks.create(name, style="words")
        assert bare.make(0, 1).key == words.make(0, 1).key
        problem = words.make(0, 1)
        assert words.grade(problem, problem.worked or "").is_right
