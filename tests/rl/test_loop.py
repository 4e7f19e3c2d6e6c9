"""Whole runs: they resume to the bit, stop within a step, and come back from a collapse."""

import itertools
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rorqual.checkpoint.tensors import TensorFile
from rorqual.errors import ConfigError, NumericsError, RorqualError, RunError
from rorqual.rl.config import ColdStart, Guard, RLConfig, Sampling, TaskMix
from rorqual.rl.losses import LossConfig
from rorqual.rl.problems import Mix
from rorqual.rl.run import reinforce
from rorqual.train import checkpoint
from rorqual.train.metrics import read
from rorqual.train.optim import clip_
from rorqual.train.shape import Shape
from rorqual.train.trainer import Result
from rorqual.verify.outcome import RIGHT, Outcome, grader_failed, wrong
from rorqual.verify.sums import Sums

Make = Callable[..., RLConfig]


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found = {}
    for path in folder.glob("*.safetensors"):
        file = TensorFile(path)
        found |= {f"{path.name}/{n}": file.read(n) for n in file.entries}
    return found


def assert_same(a: Result, b: Result) -> None:
    ours, theirs = tensors(a.folder), tensors(b.folder)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


@pytest.fixture
def generous(monkeypatch: pytest.MonkeyPatch) -> None:
    """A verdict that a model of nothing meets half of the time, so that groups are live."""

    def judge(self: Sums, problem: Any, completion: str) -> Outcome:
        return RIGHT if len(completion) % 2 == 0 else wrong("odd")

    monkeypatch.setattr(Sums, "judge", judge)


@pytest.mark.usefixtures("generous")
@pytest.mark.parametrize("at", [2, 4, 5])
def test_a_stopped_run_goes_on_to_the_same_bits(
    make_config: Make, make_view: Any, tmp_path: Path, at: int
) -> None:
    """Stopped by a signal in the cold start, and twice in reinforcement."""
    whole = reinforce(make_config(out=tmp_path / "whole"), show=make_view())

    def stop(line: dict[str, Any]) -> None:
        if line["step"] == at:
            os.kill(os.getpid(), signal.SIGTERM)

    config = make_config(out=tmp_path / "parts")
    first = reinforce(config, show=make_view(stop))
    assert first.stopped == signal.SIGTERM
    assert first.step == at
    rest = reinforce(config, resume=True, show=make_view())
    assert rest.stopped is None
    assert_same(whole, rest)
    ours = [(x["step"], x.get("reward"), x.get("accuracy")) for x in read(tmp_path / "whole")]
    assert ours == [(x["step"], x.get("reward"), x.get("accuracy")) for x in read(tmp_path / "parts")]


def test_signals_while_the_last_checkpoint_is_written_cost_nothing(
    make_config: Make, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = checkpoint.write_tensors

    def interrupted(*arguments: Any) -> None:
        signal.raise_signal(signal.SIGTERM)
        honest(*arguments)

    monkeypatch.setattr(checkpoint, "write_tensors", interrupted)
    unheard: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: unheard.append(number))
    try:
        result = reinforce(make_config(steps=1, save_every=100), show=silent)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not unheard
    assert result.stopped is None
    assert (make_config().out / "report.html").is_file()


@pytest.mark.usefixtures("generous")
def test_a_run_shows_what_matters_and_never_its_loss(make_config: Make, silent: Any) -> None:
    config = make_config()
    reinforce(config, show=silent)
    line = next(x for x in silent.lines if x["phase"] == "reinforcement")
    for key in (
        "reward",
        "live",
        "length",
        "entropy",
        "mismatch",
        "truncated",
        "grader_failed",
        "load_spread",
    ):
        assert key in line
    assert not [k for k in line if "loss" in k]
    assert line["rollout_samples"][0]["verdict"] in ("right", "wrong")
    assert line["mismatch"] < 1e-6
    end = silent.lines[-1]
    assert end["accuracy_low"] <= end["accuracy"] <= end["accuracy_high"]
    page = (config.out / "report.html").read_text(encoding="utf-8")
    assert "held-out accuracy" in page
    assert "loss of" not in page.lower()


@pytest.mark.parametrize("part", ["rorqual.rl.worked.clip_", "rorqual.rl.update.clip_"])
def test_updates_that_are_not_finite_are_skipped_counted_and_bounded(
    make_config: Make, silent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    verdicts = itertools.cycle((RIGHT, wrong("odd")))
    monkeypatch.setattr(Sums, "judge", lambda *_: next(verdicts))
    cold, calls = ColdStart(steps=3, batch=8, eval_every=100, warmup=2), [0]

    def broken(params: Any, *rest: Any) -> float:
        calls[0] += 1
        if calls[0] > bad:
            return clip_(params, *rest)
        params[0].grad.fill_(float("nan"))
        return float("nan")

    monkeypatch.setattr(part, broken)
    bad = 1
    result = reinforce(make_config(steps=2, cold_start=cold), show=silent)
    lines = [x for x in silent.lines if "skipped" in x]
    assert lines[-1]["skipped"] == 1
    assert all(t.isfinite().all() for t in tensors(result.folder).values())
    if "update" in part:
        assert any(math.isnan(x.get("grad_norm", 0)) for x in lines)
    calls[0], bad = 0, 3
    with pytest.raises(NumericsError, match=r"not finite in 3 updates in a row; lower the rate"):
        reinforce(make_config(out=tmp_path / "again", steps=4, cold_start=cold), show=silent)


@pytest.mark.usefixtures("generous")
def test_what_a_run_without_a_checkpoint_left_is_no_reference(make_config: Make, silent: Any) -> None:
    config = make_config(steps=1, loss=LossConfig(beta=0.1))
    for folder in ("reference", "best"):
        (config.out / folder).mkdir(parents=True)
        (config.out / folder / "old").touch()
    (config.out / "run.json").write_text("{}", encoding="utf-8")
    (config.out / "metrics.jsonl").write_text('{"step": 0, "of": "another"}\n', encoding="utf-8")
    reinforce(config, show=silent)
    assert "of" not in read(config.out)[0]
    assert not list(config.out.glob("*/old"))
    assert (config.out / "reference" / "config.json").is_file()


def test_a_prompt_longer_than_asked_for_is_refused(make_config: Make, silent: Any) -> None:
    with pytest.raises(ConfigError, match=r"sampling\.max_prompt=4: a problem of 'sums' has [5-9] tokens"):
        reinforce(make_config(sampling=Sampling(prompts=4, group=4, max_tokens=6, max_prompt=4)), show=silent)


def test_groups_of_equals_are_drawn_again_and_not_learnt_from(make_config: Make, silent: Any) -> None:
    """A model of nothing gets all wrong: no group teaches, the weights stay, the run goes on."""
    reinforce(make_config(steps=2), show=silent)
    line = next(x for x in silent.lines if x["phase"] == "reinforcement")
    assert line["live"] == 0
    assert line["learnt_groups"] == 0
    assert line["rollouts"] == 2 * 4 * 4  # the first draw and one refill


def test_what_the_grader_cannot_judge_is_left_out(
    make_config: Make, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """macanderson/stella#3264: not a reward of 0, and the share is shown."""
    monkeypatch.setattr(Sums, "judge", lambda self, p, c: grader_failed("slow"))
    reinforce(make_config(steps=1), show=silent)
    line = next(x for x in silent.lines if x["phase"] == "reinforcement")
    assert line["grader_failed"] == pytest.approx(
        1.0, abs=0.5
    )  # empty completions are wrong without a grader


@pytest.mark.usefixtures("generous")
def test_a_collapse_rolls_back_at_a_lower_rate(
    make_config: Make, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def collapsed(self: Any, reward: float, live: float) -> bool:
        self.reward = self.best = 1.0
        asked.append(reward)
        return len(asked) == 3

    monkeypatch.setattr("rorqual.rl.guard.Watch.collapsed", collapsed)
    reinforce(make_config(steps=4, save_every=1), show=silent)
    assert any("collapsed; back to the weights of step 5, at 0.5 of the rate" in s for s in silent.said)
    rates = [x["rate"] for x in silent.lines if "rate" in x]
    assert rates[-1] == pytest.approx(0.5e-4, rel=0.8)


@pytest.mark.usefixtures("generous")
def test_a_collapse_with_nowhere_to_go_ends_the_run(
    make_config: Make, silent: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def collapsed(self: Any, reward: float, live: float) -> bool:
        self.reward, self.live = reward, live
        return True

    monkeypatch.setattr("rorqual.rl.guard.Watch.collapsed", collapsed)
    with pytest.raises(NumericsError, match="lower lr"):
        reinforce(make_config(guard=Guard(most=0)), show=silent)


def test_a_used_folder_and_a_changed_resume_are_refused(make_config: Make, silent: Any) -> None:
    config = make_config(steps=1)
    reinforce(config, show=silent)
    with pytest.raises(RunError, match="--resume"):
        reinforce(config, show=silent)
    with pytest.raises(RunError, match="lr"):
        reinforce(make_config(steps=1, lr=1.0), resume=True, show=silent)


def test_held_out_problems_are_never_trained_on(make_config: Make) -> None:
    mix = Mix((TaskMix(),), [Sums()], 0, 64)
    held = {p.problem.key for p in mix.held_out["sums"]}
    assert not held & {mix.at(i, 0.0).problem.key for i in range(500)}


def test_a_goal_that_the_held_out_problems_cannot_show_is_refused(make_config: Make, silent: Any) -> None:
    """8 right of 8: Wilson's interval begins at 1 / (1 + 1.96²/8) = 0.676."""
    with pytest.raises(ConfigError, match=r"enough=0.7: the interval of 8 right .* begins at 0.676"):
        reinforce(make_config(enough=0.7), show=silent)


OWN = """
from rorqual.verify.sums import Sums

def family(digits):
    return Sums(terms=2, digits=digits)
"""


def test_a_family_of_ones_own_from_any_directory(
    make_config: Make, silent: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """verl-project/verl#151: a reward is named as file and function, not wired into the trainer."""
    (tmp_path / "mine.py").write_text(OWN, encoding="utf-8")
    monkeypatch.chdir(tmp_path.parent)
    mix = TaskMix(name=f"{tmp_path}/mine.py:family", options={"digits": 2}, difficulty=0)
    reinforce(make_config(tasks=(mix,), steps=1), show=silent)
    assert set(silent.lines[-1]["heldout"]) == {"mine.py:family"}
    with pytest.raises(ConfigError, match=r"no file .*/gone.py"):
        reinforce(make_config(tasks=(TaskMix(name="gone.py:f"),)), show=silent)


def test_a_model_that_is_not_there_is_named_in_full(make_config: Make, silent: Any) -> None:
    """Lightning-AI/litgpt#861: the resolved path, and what was expected there."""
    config = make_config(model=Path("/nope"), shape=Shape())
    with pytest.raises(RorqualError, match=r"/nope.*"):
        reinforce(config, show=silent)


def test_difficulty_rises_and_families_mix_by_weight() -> None:
    mix = TaskMix(difficulty=0, difficulty_end=4, ramp=0.5)
    assert [mix.difficulty_at(s) for s in (0, 0.25, 0.5, 1.0)] == [0, 2, 4, 4]
    assert TaskMix().difficulty_at(0.5) is None


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"lr": 0.0}, "lr"),
        ({"tasks": ()}, "tasks"),
        ({"updates": 99}, "updates"),
        ({"tasks": (TaskMix(), TaskMix())}, "twice"),
    ],
)
def test_contradictions_are_named(make_config: Make, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        make_config(**changes)
    with pytest.raises(ConfigError, match="temperature"):
        Sampling(temperature=0.0)
