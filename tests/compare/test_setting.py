"""Settings are overrides of one run's config; parts come off and go on by name."""

import pytest

from rorqual.compare.setting import BASE, PARTS, RECIPE, TABLES, Setting, with_overrides
from rorqual.config import from_dict, put
from rorqual.errors import ConfigError
from rorqual.train.config import TrainConfig


def config(setting: Setting) -> TrainConfig:
    tree: dict[str, object] = {}
    for key, value in setting.overrides().items():
        put(tree, key, value)
    return from_dict(TrainConfig, tree)


@pytest.mark.parametrize("part", PARTS)
def test_every_part_makes_a_config_alone_and_can_be_taken_out(part: str) -> None:
    config(BASE.plus("one", (part,)))
    if part in RECIPE.parts:
        config(RECIPE.without(part))


def test_without_takes_out_just_that_part() -> None:
    whole, less = RECIPE.overrides(), RECIPE.without("zero-output").overrides()
    assert {k for k in whole if whole[k] != less.get(k)} == set(PARTS["zero-output"])


def test_the_equal_parameter_control_is_the_baseline_but_for_tables() -> None:
    a, b = BASE.overrides(), BASE.plus("control", TABLES).overrides()
    tables = {"shape.ngram_table_size", "shape.triple_table_size", "shape.value_embeddings"}
    assert {k for k in b if a.get(k) != b[k]} == tables
    whole = RECIPE.overrides()
    assert all(b[k] == whole[k] for k in tables)


def test_a_part_keeps_its_own_rates_on_a_swept_baseline() -> None:
    """Muon at the rates that were swept for AdamW is no control."""
    swept = BASE.at(optim__lr=0.5, optim__clip=2.0)
    assert swept.plus("x", ("pairs",)).overrides()["optim.lr"] == 0.5
    under_muon = swept.plus("x", ("muon",)).overrides()
    assert under_muon["optim.lr"] == PARTS["muon"]["optim.lr"]
    assert under_muon["optim.clip"] == 2.0


def test_latent_attention_without_experts_is_dense() -> None:
    assert config(BASE.plus("x", ("mla",))).shape.experts == 0
    assert config(BASE.plus("x", ("mla", "experts"))).shape.experts == 32


def test_what_is_not_a_part_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="part 'tables'"):
        Setting("x", ("tables",))
    with pytest.raises(ConfigError, match="--without mla: baseline"):
        BASE.without("mla")
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        with_overrides(RECIPE, ["fast"])


@pytest.mark.parametrize("pair", ["seed=5", "eval_rows=1", "steps=60", "stop_at=10", "parallel.tensor=2"])
def test_an_idea_cannot_change_the_measure(pair: str) -> None:
    with pytest.raises(ConfigError, match=f"--idea {pair}: .* belongs to the measure"):
        with_overrides(RECIPE, [pair])


def test_ideas_are_read_as_json_values() -> None:
    assert config(with_overrides(RECIPE, ["optim.lr=0.02"])).optim.lr == 0.02
