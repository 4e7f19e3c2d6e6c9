"""Configs: one dial, files and overrides; unknown, wrong and contradictory keys are refused before anything runs."""

import json
import time
from pathlib import Path

import pytest

from rorqual.config import from_dict, load_config, to_dict
from rorqual.errors import ConfigError
from rorqual.model.config import ModelConfig
from rorqual.model.cost import cost
from rorqual.train.command import TrainOptions, parse_train, train_config
from rorqual.train.config import TrainConfig, due
from rorqual.train.shape import Shape


@pytest.mark.parametrize("depth", [1, 2, 4, 6, 12])
def test_one_dial_gives_both_families_about_the_same_compute(depth: int) -> None:
    deepseek = cost(Shape(depth=depth).model(4096, 512))
    llama = cost(Shape(family="llama", depth=depth).model(4096, 512))
    assert deepseek.active == pytest.approx(llama.active, rel=0.08)
    assert deepseek.config.hidden_size == llama.config.hidden_size == 64 * depth
    assert 2 * deepseek.cache_elements <= llama.cache_elements


def test_architectures_are_published_ones_until_an_option_of_ours_is_on() -> None:
    assert Shape().model(300, 64).architecture == "DeepseekV3ForCausalLM"
    assert Shape(balance="loss").model(300, 64).architecture == "DeepseekV2ForCausalLM"
    assert Shape(family="llama").model(300, 64).architecture == "LlamaForCausalLM"
    assert Shape(family="llama", qk_norm=True).model(300, 64).architecture == "Qwen3ForCausalLM"
    for option in ({"qk_norm": True}, {"smear": True}, {"logit_softcap": 15.0}, {"ngram_table_size": 64}):
        config = Shape(**option).model(300, 64)
        assert config.architecture == "RorqualForCausalLM"
        assert ModelConfig.from_hf(config.to_hf()) == config


def test_the_vocabulary_is_padded_and_never_cut() -> None:
    assert Shape().model(300, 64).vocab_size == 320
    assert Shape(vocab_size=512).model(300, 64).vocab_size == 512
    with pytest.raises(ConfigError, match=r"shape.vocab_size=256: the tokenizer has 300"):
        Shape(vocab_size=256).model(300, 64)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        # Jiayi-Pan/TinyZero#5, #30: text, 0 and what does not divide, at the start and by name
        (['batch_size="4"'], "batch_size='4': must be a whole number"),
        (["batch_size=0"], "batch_size=0: must be 1 or more"),
        (["accumulate=1.5"], "accumulate=1.5: must be a whole number"),
        (["shape.heads=3"], "shape.heads=3: must divide the width 256"),
        (["shape.kv_heads=3", "shape.family=llama"], "shape.kv_heads=3: must divide heads=4"),
        (["shape.family=gpt"], "shape.family='gpt': must be one of 'deepseek', 'llama'"),
        (["optim.learning_rate=1"], "optim.learning_rate=1: unknown key"),
        (["optm.lr=1"], "optm={'lr': 1}: unknown key; did you mean 'optim'"),
        (["shape.family=llama", "shape.experts=8"], "shape.experts=8: contradicts shape.family='llama'"),
        (["shape.kv_heads=2"], "shape.kv_heads=2: contradicts shape.family='deepseek'"),
        (["shape.experts=0", "shape.balance=loss"], "shape.balance='loss': contradicts shape.experts=0"),
        (["shape.experts=3"], "shape.experts=3: must be more than experts_per_token=3"),
        (["optim.name=adamw", "optim.momentum=0.9"], "optim.momentum=0.9: is Muon's"),
        (["optim.lr=0"], "optim.lr=0.0: must be above 0"),
        (["extend_context=512"], "extend_context=512: needs init_from"),
        (["init_from=m", "shape.depth=2"], "shape.depth=2: init_from=m brings its own shape"),
        (["init_from=m", "extend_context=128"], "extend_context=128: must be at least seq_len=256"),
        (["mtp_weight=0.1"], "mtp_weight=0.1: needs MTP modules"),
        (["seed=-1"], "seed=-1: must be 0 or more"),
        (["shape.initializer_range=-1"], "shape.initializer_range=-1.0: must be above 0"),
        (["optim.lr=NaN"], "optim.lr=nan: must be a finite number"),
        (["schedule.floor=-Infinity"], "schedule.floor=-inf: must be a finite number"),
        (["stop_at=2000"], "stop_at=2000: must be at most steps=1000"),
    ],
)
def test_what_cannot_work_is_refused_by_name(overrides: list[str], named: str) -> None:
    begin = time.monotonic()
    with pytest.raises(ConfigError) as error:
        load_config(TrainConfig, overrides=overrides)
    assert named in str(error.value)
    assert time.monotonic() - begin < 2


def test_a_file_and_overrides(tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text("steps = 7\n[shape]\ndepth = 3\n[optim]\nname = 'adamw'\nlr = 0.001\n")
    config = load_config(TrainConfig, path, ["optim.lr=0.002", "shape.family=llama"])
    assert (config.steps, config.shape.depth, config.optim.lr, config.shape.family) == (7, 3, 0.002, "llama")
    assert from_dict(TrainConfig, to_dict(config)) == config


@pytest.mark.parametrize(
    "recipe", sorted((Path(__file__).parents[2] / "recipes").glob("*.toml")), ids=lambda p: p.stem
)
def test_every_recipe_is_valid(recipe: Path) -> None:
    config = load_config(TrainConfig, recipe)
    assert cost(config.shape.model(4096, config.seq_len)).parameters > 0


def test_flags_and_overrides_do_not_swallow_each_other() -> None:
    line = ["--data", "a", "shape.depth=3", "--data", "b", "--out", "r", "steps=5", "--family", "llama"]
    config = train_config(parse_train(line))
    assert config.data == (Path("a"), Path("b"))
    assert (config.shape.depth, config.shape.family, config.steps, config.out) == (3, "llama", 5, Path("r"))


def test_a_resumed_run_goes_on_past_where_it_was_to_stop(tmp_path: Path) -> None:
    config = TrainConfig(out=tmp_path, stop_at=3)
    (tmp_path / "run.json").write_text(json.dumps(to_dict(config)), encoding="utf-8")
    assert train_config(TrainOptions(out=tmp_path, resume=True)) == TrainConfig(out=tmp_path)
    assert train_config(TrainOptions(("stop_at=6",), out=tmp_path, resume=True)).stop_at == 6


def test_off_means_off() -> None:
    """karpathy/nanochat#324: evaluation turned off with -1 broke the end of the run."""
    assert not any(due(every, step) for every in (0, -1) for step in range(1, 20))
    assert [step for step in range(1, 10) if due(3, step)] == [3, 6, 9]
