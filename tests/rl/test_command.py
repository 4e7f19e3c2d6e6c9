"""`rorqual rl`: recipes, files, overrides."""

import json
from pathlib import Path

import pytest

from rorqual.cli import main
from rorqual.config import to_dict
from rorqual.errors import ConfigError, RunError
from rorqual.rl.command import RECIPES, RLOptions, rl_config
from rorqual.rl.problems import Mix
from rorqual.rl.run import check_goal
from rorqual.verify.tasks import create


@pytest.mark.parametrize("name", sorted(p.stem for p in RECIPES.glob("*.toml")))
def test_every_recipe_is_a_run_of_families_that_exist(name: str, tmp_path: Path) -> None:
    text = (RECIPES / f"{name}.toml").read_text(encoding="utf-8")
    model = tmp_path if "--model" in text else None
    config = rl_config(RLOptions(recipe=name, model=model))
    for mix in config.tasks:
        task = create(mix.name, **mix.options)
        problem = task.make(0, 0, mix.difficulty_at(0.0))
        assert problem.worked is not None or not config.cold_start.steps
    assert config.out.name == f"rl-{name}"
    tasks = [create(mix.name, **mix.options) for mix in config.tasks]
    check_goal(config, Mix(config.tasks, tasks, config.seed, config.eval_problems))


def test_overrides_win_over_recipes() -> None:
    config = rl_config(RLOptions(("steps=7", "sampling.group=3"), recipe="sums"))
    assert (config.steps, config.sampling.group, config.sampling.max_tokens) == (7, 3, 11)


def test_faults_name_the_cure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"there are .*sums"):
        rl_config(RLOptions(recipe="nothing"))
    with pytest.raises(ConfigError, match="one of them"):
        rl_config(RLOptions(recipe="sums", config=tmp_path / "a.toml"))
    with pytest.raises(RunError, match="nothing to resume"):
        rl_config(RLOptions(out=tmp_path, resume=True))
    assert main(["rl", "steps=3"]) == 2
    assert "cold_start" in capsys.readouterr().err


def test_a_resumed_run_goes_on_past_where_it_was_to_stop(tmp_path: Path) -> None:
    """Whatever letters its folder's name has."""
    out = tmp_path / "läuf"
    out.mkdir()
    config = rl_config(RLOptions(("stop_at=4",), recipe="sums", out=out))
    (out / "run.json").write_text(json.dumps(to_dict(config)), encoding="utf-8")
    again = rl_config(RLOptions(out=out, resume=True))
    assert (again.out, again.stop_at, again.steps) == (out, None, config.steps)
    assert rl_config(RLOptions(("stop_at=6",), out=out, resume=True)).stop_at == 6


def test_show_prints_the_config(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rl", "--recipe", "sums", "--show", "sampling.group=4"]) == 0
    assert '"group": 4' in capsys.readouterr().out
