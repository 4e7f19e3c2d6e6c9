"""The measure: where the recipe passes, on results whose answer is known by arithmetic."""

import dataclasses
import json
import shutil
from collections.abc import Iterable
from math import log2
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import rorqual
from rorqual.compare.budget import PRESETS, Budget, budget
from rorqual.compare.command import CompareOptions, sized
from rorqual.compare.job import Job, Result, code
from rorqual.compare.report import Findings, page, summary
from rorqual.compare.setting import BASE, RECIPE, Setting
from rorqual.compare.study import Pools, Study, equivalent_steps, last_passing
from rorqual.errors import ConfigError

SMALL = Budget(
    "test", steps=640, seeds=3, control_seeds=2, fractions=(2, 4, 8), lr=0.02, embedding_lr=0.2, head_lr=0.2,
    search_depth=False,
)  # fmt: skip


def result(job: Job, loss: float) -> Result:
    return Result(
        job.setting.name, job.steps, job.seed, loss, loss / 3, job.steps * 10, job.steps * 1e6, job.steps * 1e4,
        job.steps * 0.1, job.steps * 0.1, 10**8, 1000, 900, 50, 64, [[job.steps, loss]],
        f"{job.setting.name}{job.steps}{job.seed}",
    )  # fmt: skip


class Law:
    """A pool whose runs obey a law: 1/3 nat less for each doubling of steps, the recipe as if it had `gain` times more;
    the baseline is best at a rate of 0.02 and each factor of two from it costs 0.1."""

    def __init__(self, gain: float, noise: float = 0.0, best: float = 0.02) -> None:
        self.gain, self.noise, self.best = gain, noise, best
        self.asked: list[Job] = []

    def all(self, jobs: Iterable[Job]) -> list[Result]:
        found = []
        for job in jobs:
            self.asked.append(job)
            steps = job.steps * (self.gain if job.setting.name == "recipe" else 1.0)
            rate = dict(job.setting.more).get("optim.lr", self.best)
            more = dict(job.setting.more)
            off = sum(abs(log2(more.get(f"optim.{k}_lr", 0.2) / 0.2)) for k in ("embedding", "head"))
            loss = (
                7 - log2(steps) / 3 + 0.1 * (abs(log2(rate / self.best)) + off) + self.noise * (job.seed - 1)
            )
            found.append(result(job, loss))
        return found


def study(law: Any, budget: Budget = SMALL) -> Study:
    return Study(budget, Pools(Path("built"), Path("runs")), law)


@pytest.mark.parametrize(("gain", "passing"), [(1.5, None), (2.01, 320), (4.5, 160), (7.9, 160), (8.1, 80)])
def test_the_passing_point_is_the_fewest_steps_that_reach_the_loss(gain: float, passing: int | None) -> None:
    found = study(Law(gain)).match(RECIPE, BASE, 3)
    assert (found.passing and found.passing.steps) == passing
    if passing:
        assert found.factors["tokens"] == pytest.approx(640 / passing)
        assert found.factors["FLOPs"] == pytest.approx(640 / passing)


def test_one_seed_that_misses_the_loss_fails_the_point() -> None:
    """Mean loss of the baseline's seeds is the target; the recipe's worst seed at 160 steps is 0.05 above it."""
    assert study(Law(4.1, noise=0.1)).match(RECIPE, BASE, 3).passing.steps == 320  # type: ignore[union-attr]


def test_the_sweep_goes_on_while_the_best_rate_lies_at_an_end() -> None:
    tuned, runs = study(Law(1, best=0.64)).sweep()
    assert {t.budget.lr for t in runs} == {0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64, 1.28}
    assert dict(tuned.baseline.more)["optim.lr"] == tuned.budget.lr == 0.64
    assert study(Law(1, best=0.64)).sweep(rounds=1)[0].budget.lr < 0.64
    tuned, runs = study(Law(1)).sweep()
    assert dict(tuned.baseline.more) == {"optim.lr": 0.02, "optim.embedding_lr": 0.2, "optim.head_lr": 0.2}
    assert len(runs) == 7  # the middle, and two beside it of each


@pytest.mark.parametrize("best", [1, 2, 3, 5])
def test_the_sweep_finds_the_depth_at_equal_flops(best: int) -> None:
    """Every arm's steps make the same FLOPs, and a search that comes back to a depth counts the same steps."""

    class Deep(Law):
        def all(self, jobs: Iterable[Job]) -> list[Result]:
            found = []
            for job in jobs:
                self.asked.append(job)
                lr = dict(job.setting.more)["optim.lr"]
                # The best rate goes with the depth, so a second round is needed.
                off = abs(job.budget.depth - best) + 0.1 * abs(log2(lr / (0.02 * 2**best)))
                found.append(result(job, 4 + off))
            return found

    law = Deep(1)
    budget = dataclasses.replace(SMALL, search_depth=True)
    tuned, runs = study(law, budget).sweep()
    assert (tuned.budget.depth, tuned.budget.lr) == (best, 0.02 * 2**best)
    assert len({t.budget.steps for t in runs}) == len({t.budget.depth for t in runs}) > 1
    assert {t.budget.depth for t in runs} >= {max(best - 1, 1), best, best + 1}
    for t in runs:
        assert t.budget.steps * t.budget.flops_per_step == pytest.approx(
            640 * budget.flops_per_step, rel=2e-3
        )
    assert all(j.budget.steps == j.steps for j in law.asked)


def test_a_depth_that_was_asked_for_stays(tmp_path: Path) -> None:
    budget = sized(CompareOptions(depth=2))
    assert not budget.search_depth
    law = Law(1)
    study(law, dataclasses.replace(budget, lr=0.02)).sweep()
    assert {j.budget.depth for j in law.asked} == {2}


def test_a_deeper_baseline_drops_the_fractions_that_its_steps_cannot_bear() -> None:
    budget = dataclasses.replace(SMALL, steps=80, depth=3)
    assert budget.at_depth(6).fractions == (2, 4)
    assert budget.at_depth(3) == budget


def test_beginnings_are_told_apart_before_a_search() -> None:
    """0.1 a factor of two from the best: a rate of 0.08 begins 0.2 above it."""
    near, far = (study(Law(1), dataclasses.replace(SMALL, lr=lr)).beginning().loss for lr in (0.02, 0.08))
    assert far - near == pytest.approx(0.2)


def test_rates_that_hang_together_are_found() -> None:
    """The best rate of matrices is that of embeddings: one round would end beside it."""

    class Together(Law):
        def all(self, jobs: Iterable[Job]) -> list[Result]:
            found = []
            for job in jobs:
                r = {k.split(".")[1]: log2(float(v)) for k, v in dict(job.setting.more).items()}
                off = 0.25 * (r["lr"] - r["embedding_lr"]) ** 2 + (r["embedding_lr"] - log2(0.8)) ** 2
                found.append(result(job, 4 + off))
            return found

    tuned, _ = study(Together(1), dataclasses.replace(SMALL, lr=0.2)).sweep()
    assert tuned.budget.embedding_lr == tuned.budget.lr == pytest.approx(0.8)


def test_long_runs_are_spared() -> None:
    law = Law(16)
    study(law).match(RECIPE, BASE, 1)
    assert {j.steps for j in law.asked if j.setting is RECIPE} == {160, 80}


def test_last_passing_on_every_threshold() -> None:
    fractions = (1, 2, 3, 4, 6, 8)
    for limit in range(10):
        expected = max((f for f in fractions if f <= limit), default=None)
        assert last_passing(fractions, lambda f, limit=limit: f <= limit) == expected


def test_equivalent_steps_reads_the_line_over_log_steps() -> None:
    points = [SimpleNamespace(steps=100, loss=4.0), SimpleNamespace(steps=200, loss=3.5)]
    assert equivalent_steps(3.0, 77, points) == pytest.approx(400)  # type: ignore[arg-type]
    assert equivalent_steps(3.0, 77, points[:1]) == 77  # type: ignore[arg-type]


def test_the_page_and_the_summary_tell_the_factors() -> None:
    s = study(Law(4.5))
    found = Findings(SMALL, matches={"architecture and training": s.match(RECIPE, BASE, 3)})
    assert "4.00x fewer FLOPs" in summary(found)[0]
    assert "4.0x" in page(found)
    assert "passes: " in page(found)
    missed = Findings(SMALL, matches={"it": study(Law(1)).match(RECIPE, BASE, 3)})
    assert "does not within the steps tried" in summary(missed)[0]
    assert "not passed" in page(missed)
    assert found.tree()["matches"]["architecture and training"]["passing_steps"] == 160


def test_budgets() -> None:
    assert budget("quick") is PRESETS["quick"]
    assert budget("1e12").steps == round(1e12 / Budget().flops_per_step)
    assert budget("1e12", dataclasses.replace(Budget(), width=32)).width == 32
    with pytest.raises(ConfigError, match="--budget fast"):
        budget("fast")
    for text in ("nan", "inf", "-1e12"):
        with pytest.raises(ConfigError, match=f"--budget {text}: must be above 0 and finite"):
            budget(text)
    with pytest.raises(ConfigError, match="too few"):
        dataclasses.replace(SMALL, steps=70)
    with pytest.raises(ConfigError, match="the smallest first"):
        dataclasses.replace(SMALL, fractions=(4, 2))


def test_steps_are_counted_with_the_head_of_the_pool_that_was_given(tmp_path: Path) -> None:
    """At 32,768 tokens most of a small model's FLOPs are its head's."""
    (tmp_path / "meta.json").write_text(json.dumps({"splits": {}, "vocab_size": 32768, "dtype": "uint16"}))
    asked = sized(CompareOptions(budget="3e13", data=tmp_path))
    assert asked.vocab_size == 32768
    for depth in (1, 2, 4):
        b = asked.at_depth(depth)
        assert b.steps * b.flops_per_step == pytest.approx(3e13, rel=0.01)


def test_a_job_of_other_code_is_another_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({"splits": {}}))
    job = Job(BASE, SMALL, 10, 0, tmp_path, tmp_path, tmp_path)
    names, root = set(), Path(rorqual.__file__).parent
    for place in ("here", "changed"):
        shutil.copytree(root, tmp_path / place, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        if place == "changed":
            with (tmp_path / place / "model" / "moe.py").open("a") as file:
                file.write("# another\n")
        monkeypatch.setattr(rorqual, "__file__", str(tmp_path / place / "__init__.py"))
        code.cache_clear()
        names.add(job.config.out)
    code.cache_clear()
    assert len(names) == 2


def test_a_job_is_known_by_all_that_its_result_depends_on(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "meta.json").write_text(json.dumps({"splits": name}))
    job = Job(BASE, SMALL, 10, 0, tmp_path / "a", tmp_path / "a", tmp_path)
    others = [
        dataclasses.replace(job, setting=BASE.at(optim__lr=0.5)),
        dataclasses.replace(job, steps=11),
        dataclasses.replace(job, seed=1),
        dataclasses.replace(job, data=tmp_path / "b"),
        dataclasses.replace(job, target=tmp_path / "b"),
        dataclasses.replace(job, budget=dataclasses.replace(SMALL, width=128)),
        dataclasses.replace(job, setting=Setting("baseline", ("muon",))),
    ]
    outs = {j.config.out for j in [job, *others]}
    assert len(outs) == 1 + len(others)
    assert dataclasses.replace(job, setting=Setting("baseline")).config.out == job.config.out


def test_a_comparison_that_is_moved_finds_its_runs(tmp_path: Path) -> None:
    names = []
    for place in ("here", "there"):
        data = tmp_path / place / "data"
        data.mkdir(parents=True)
        meta = {"splits": {"train": ["checksum"]}, "config": {"out": str(data)}}
        (data / "meta.json").write_text(json.dumps(meta))
        config = Job(BASE, SMALL, 10, 0, data, data, tmp_path / place / "runs").config
        assert config.data == (data,)
        names.append(config.out.relative_to(tmp_path / place))
    assert names[0] == names[1]
