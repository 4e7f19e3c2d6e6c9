"""Evaluation: windows cover a text once, intervals and paired tests are right, HumanEval runs in the sandbox."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from rorqual.cli import main
from rorqual.data.bpe import train_bpe, write_tokenizer
from rorqual.errors import ConfigError, DataError, SandboxError
from rorqual.eval import bits, compare
from rorqual.eval.config import EvalConfig, parse_task
from rorqual.eval.families import count, suite
from rorqual.eval.humaneval import HumanEval
from rorqual.text.tokenizer import Tokenizer
from rorqual.verify.outcome import RIGHT, Verdict, grader_failed, wrong


def test_windows_predict_every_token_once() -> None:
    for length in (1, 2, 7, 8, 9, 64, 100):
        seen = [i for _, fresh, end in bits.windows(length, 8) for i in range(fresh, end)]
        assert seen == list(range(1, length))
        assert all(end - begin <= 8 and begin < fresh for begin, fresh, end in bits.windows(length, 8))


def test_an_even_guess_costs_the_logarithm_of_the_vocabulary() -> None:
    class Even:
        class config:
            max_position_embeddings = 16

        def logits(self, ids: torch.Tensor) -> torch.Tensor:
            return torch.zeros(1, ids.shape[1], 32)

    nats, tokens, first_lost = bits.score(Even(), list(range(30)), 8, None)  # type: ignore[arg-type]
    assert (tokens, first_lost) == (29, True)
    assert nats / tokens / math.log(2) == pytest.approx(5)
    assert bits.score(Even(), list(range(1, 30)), 8, 0)[1:] == (29, False)  # type: ignore[arg-type]


class Coin:
    """A model that gives every token the same chance, so that bits per byte are a matter of counting."""

    class config:
        max_position_embeddings = 64
        vocab_size = 300

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.load(folder)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.zeros(1, ids.shape[1], self.config.vocab_size)


@pytest.mark.parametrize("bos", [True, False])
def test_every_byte_of_a_text_counts_once(token_set: Path, tmp_path: Path, bos: bool) -> None:
    """A BOS is no byte of the text; without one, the first token of each piece is predicted by nothing."""
    coin: Any = Coin(token_set)
    coin.tokenizer.add_bos = bos
    (tmp_path / "text").write_text("ü" * 640, encoding="utf-8")
    row = bits.of_file(coin, tmp_path / "text", 32)
    first = len(coin.tokenizer.token_bytes(coin.tokenizer.encode("ü" * 20, add_bos=False)[0]))
    assert row["bytes"] == 1280 - (0 if bos else bits.PIECES * first)
    assert row["fingerprint"] != bits.of_file(coin, tmp_path / "text", 64)["fingerprint"]


def test_a_set_of_another_tokenizer_is_refused(token_set: Path, tmp_path: Path) -> None:
    coin: Any = Coin(token_set)
    row = bits.of_data(coin, token_set, 32)
    assert row["fingerprint"] != bits.of_data(coin, token_set, 64)["fingerprint"]
    other = shutil.copytree(token_set, tmp_path / "other")
    write_tokenizer(other, train_bpe(["qx" * 50, "zj" * 50], 300))
    with pytest.raises(DataError, match=r"made by another tokenizer \(id \d+ is b"):
        bits.of_data(coin, other, 32)


def test_counts_leave_out_what_the_grader_could_not_judge() -> None:
    row = count([[RIGHT], [wrong("x")], [grader_failed("x")], [RIGHT]])
    assert row["accuracy"] == pytest.approx(2 / 3)
    assert (row["grader_failed"], row["right"], row["judged"]) == (1, [1, 0, 0, 1], [1, 1, 0, 1])
    assert row["low"] < 2 / 3 < row["high"]
    many = count([[RIGHT, wrong("x")], [wrong("x"), wrong("x")]])
    assert many["passes"] == {"pass@1": 0.25, "pass@2": 0.5}


def result(right: list[int], fingerprint: str = "f") -> dict[str, Any]:
    row = {"task": "sums", "fingerprint": fingerprint, "right": right, "judged": [1] * len(right)}
    return {"kind": "rorqual eval", "model": "m", "tasks": [row], "texts": []}


def test_the_paired_test_is_mcnemars() -> None:
    """8 better and 1 worse: 2 * (C(9,0) + C(9,1)) / 2^9 = 0.0390625 by hand."""
    a, b = [0] * 8 + [1] + [1] * 11, [1] * 8 + [0] + [1] * 11
    (row,) = compare.compare(result(a), result(b))
    assert row.p == pytest.approx(0.0390625)
    assert row.b - row.a == pytest.approx(7 / 20)
    assert row.low < 7 / 20 < row.high
    assert compare.sign_test(0, 0) == 1.0
    assert compare.flip_test([0.0, 0.0]) == 1.0
    assert compare.flip_test([1.0] * 12) < 0.01 < compare.flip_test([1.0, -1.0, 0.5])


def test_results_of_other_problems_are_not_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(DataError, match="not of the same problems"):
        compare.compare(result([1]), result([1], "g"))
    for name, right in (("a", [0, 1]), ("b", [1, 1])):
        (tmp_path / f"{name}.json").write_text(json.dumps(result(right)))
    assert main(["eval", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 0
    assert "sums" in capsys.readouterr().out
    (tmp_path / "b.json").write_text("{}")
    assert main(["eval", "--compare", str(tmp_path / "a.json"), str(tmp_path / "b.json")]) == 2
    assert "not a result of" in capsys.readouterr().err


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ConfigError, match="temperature=0"):
        EvalConfig(samples=4)
    with pytest.raises(ConfigError, match="unknown"):
        suite("sumz", EvalConfig(), False)
    with pytest.raises(ConfigError, match="no options"):
        suite("humaneval:a=1", EvalConfig(), False)
    assert parse_task("sums:terms=3,style=words") == ("sums", {"terms": 3, "style": "words"})
    assert main(["eval"]) == 2
    assert main(["eval", "nowhere"]) == 2


def test_families_are_held_out_problems_at_a_fixed_seed() -> None:
    config = EvalConfig(problems=5)
    one, other = suite("sums", config, False), suite("sums", config, True)
    assert [p.key for p in one.problems] == [p.key for p in other.problems]
    assert one.problems[0] == one.task.make(config.seed, 0, None, "held_out")


def test_no_problem_counts_twice() -> None:
    problems = suite("functions", EvalConfig(problems=200, difficulty=0), False).problems
    assert len(problems) == len({p.key for p in problems}) < 20


def test_where_results_go_is_seen_to_first(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", "nowhere", "--tasks", "sums", "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["eval", "nowhere", "--tasks", "sums", "--out", str(tmp_path / "file" / "a.json")]) == 2
    assert "name another" in capsys.readouterr().err


@pytest.mark.parametrize("chat", [False, True])
def test_some_of_humaneval(chat: bool) -> None:
    task = HumanEval(chat)
    for problem in task.problems(8):
        body = problem.worked or ""
        whole = f"Here:\n```python\n{problem.meta['stub']}{body}```\n"
        assert task.grade(problem, whole if chat else body).verdict is Verdict.RIGHT
        assert task.grade(problem, "    return None\n").verdict is Verdict.WRONG
        assert task.grade(problem, "    import os; os._exit(0)\n").verdict is Verdict.WRONG


def test_a_completion_ends_no_evaluation(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RecursionError("too deep")

    monkeypatch.setattr("rorqual.verify.code.grade_check", fail)
    task = HumanEval(chat=False)
    assert task.grade(task.problems(1)[0], "    return 1\n").verdict is Verdict.GRADER_FAILED


@pytest.mark.slow
def test_all_canonical_solutions_of_humaneval_pass_and_empty_ones_do_not() -> None:
    task = HumanEval(chat=False)
    problems = task.problems(164)
    assert len(problems) == 164
    assert [p.key for p in problems if not task.grade(p, p.worked or "").is_right] == []
    assert [p.key for p in problems if task.grade(p, "    return None\n").verdict is not Verdict.WRONG] == []


def test_without_a_sandbox_nothing_is_generated_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    def none() -> None:
        raise SandboxError("no sandbox")

    monkeypatch.setattr("rorqual.verify.code.shared", none)
    for spec in ("humaneval", "functions"):
        with pytest.raises(SandboxError, match="no sandbox"):
            suite(spec, EvalConfig(), False)
