"""config.json of the supported architectures, both ways, and what is refused."""

from typing import Any

import pytest

from rorqual.errors import ConfigError
from rorqual.model.config import ModelConfig
from rorqual.model.published import PUBLISHED, published


@pytest.mark.parametrize("name", PUBLISHED)
def test_to_hf_reads_back_equal(name: str) -> None:
    config = published(name)
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("kind", ["linear", "llama3"])
def test_the_temperature_of_a_stretched_context_is_written(kind: str) -> None:
    rope = {"rope_type": kind, "factor": 4.0, "rope_theta": 500.0, "mscale_all_dim": 1.0}
    if kind == "llama3":
        rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    config = ModelConfig.from_hf(PUBLISHED["deepseek-v3"] | {"rope_parameters": rope, "rope_scaling": None})
    assert config.rope.mscale_all_dim == 1.0
    assert ModelConfig.from_hf(config.to_hf()) == config


def test_extensions_read_back_equal_and_need_our_architecture(make_config) -> None:
    extra = {
        "logit_softcap": 15.0,
        "value_embeddings": True,
        "ngram_table_size": 64,
        "induction": 4,
        "x0_residual": True,
        "smear": True,
    }
    config = make_config(architecture="RorqualForCausalLM", qk_norm=True, **extra)
    assert ModelConfig.from_hf(config.to_hf()) == config
    assert set(config.extensions) == {*extra, "qk_norm"}
    with pytest.raises(ConfigError, match="logit_softcap"):
        make_config(logit_softcap=15.0)


def changed(name: str, **changes: Any) -> dict[str, Any]:
    return {**PUBLISHED[name], **changes}


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        (changed("deepseek-v2-lite", some_new_gate=3), "some_new_gate=3: not a key"),
        (changed("deepseek-v2-lite", hidden_act="gelu"), "hidden_act='gelu'"),
        (changed("smollm2-135m", use_sliding_window=True), "use_sliding_window=True"),
        (changed("smollm2-135m", layer_types=["sliding_attention"] * 30), "layer_types"),
        (changed("smollm2-135m", rope_scaling={"type": "longrope", "factor": 2.0}), "rope_type='longrope'"),
        (changed("smollm2-135m", rope_scaling={"type": "yarn", "factor": 2.0, "extra": 1}), "rope extra=1"),
        (changed("deepseek-v3", architectures=["MambaForCausalLM"]), "architectures"),
        (changed("deepseek-v3", n_group=7), "n_group=7: must divide n_routed_experts=256"),
        (changed("deepseek-v3", num_experts_per_tok=300), "num_experts_per_tok=300"),
        (changed("deepseek-v3", scoring_func="softmax"), "topk_method='noaux_tc'"),
        (changed("deepseek-v2", topk_method="greedy"), "greedy ignores groups"),
        (changed("deepseek-v3", hidden_size="7168"), "hidden_size='7168': must be int"),
        (changed("smollm2-135m", num_key_value_heads=2), "num_key_value_heads=2: must divide"),
        ({"architectures": ["LlamaForCausalLM"], "vocab_size": 8}, "missing hidden_size"),
        (changed("smollm2-135m", logit_softcap=30.0), "logit_softcap=30.0: not a key"),
    ],
)
def test_what_would_change_the_maths_is_refused_by_name(tree: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(tree)


def test_harmless_keys_are_read_over() -> None:
    tree = changed(
        "deepseek-v3", transformers_version="4.33.1", use_cache=True, torch_dtype="bfloat16", ep_size=1
    )
    assert ModelConfig.from_hf(tree) == published("deepseek-v3")


def test_keys_of_released_files_are_read_over() -> None:
    """SmolLM2's and DeepSeek-R1-Distill-Qwen's config.json; at another value the second kind changes the maths."""
    tree = changed(
        "smollm2-135m", is_llama_config=True, rope_interleaved=False, **{"transformers.js_config": {}}
    )
    assert ModelConfig.from_hf(tree) == published("smollm2-135m")
    assert ModelConfig.from_hf(changed("smollm2-135m", use_mrope=False)) == published("smollm2-135m")
    with pytest.raises(ConfigError, match="rope_interleaved=True"):
        ModelConfig.from_hf(changed("smollm2-135m", rope_interleaved=True))


def test_v2_normalises_or_scales_and_v3_does_both() -> None:
    """sgl-project/sglang-jax#1282: an explicit choice of the config."""
    assert not published("deepseek-v2").scale_after_norm
    assert published("deepseek-v3").scale_after_norm


def test_mtp_has_two_names() -> None:
    tree = {k: v for k, v in PUBLISHED["deepseek-v3"].items() if k != "num_nextn_predict_layers"}
    assert ModelConfig.from_hf({**tree, "num_mtp_layers": 1}).num_nextn_predict_layers == 1


def test_first_dense_layers() -> None:
    v3 = published("deepseek-v3")
    assert [v3.is_moe(i) for i in range(5)] == [False, False, False, True, True]
    assert [published("glm-4.7-flash").is_moe(i) for i in (0, 1, 46)] == [False, True, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": "16"}, "hidden_size='16': must be int"),
        ({"num_attention_heads": [1]}, "num_attention_heads="),
        ({"rope_scaling": "yarn"}, "rope_scaling='yarn': must be an object"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\]: must be an object"),
        ({"rope_theta": -1.0, "rope_scaling": None}, "rope rope_theta=-1.0: must be above 0"),
        ({"n_shared_experts": -1}, "n_shared_experts=-1"),
        ({"moe_layer_freq": 0}, "moe_layer_freq=0"),
    ],
    ids=str,
)
def test_values_of_another_kind_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig.from_hf(changed("deepseek-v3", **changes))


@pytest.mark.parametrize(
    ("kind", "key", "value"),
    [
        ("linear", "factor", 0),
        ("yarn", "beta_fast", 0),
        ("yarn", "beta_slow", -1.0),
        ("yarn", "original_max_position_embeddings", 0),
        ("yarn", "rope_theta", 1),
        ("llama3", "low_freq_factor", 4.0),
        ("llama3", "high_freq_factor", 0),
        ("default", "rope_theta", float("inf")),
    ],
)
def test_a_rope_without_frequencies_is_refused(kind: str, key: str, value: float) -> None:
    rope = {"rope_type": kind, "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 500.0}
    with pytest.raises(ConfigError, match="rope (high_freq_factor|" + key + ")="):
        ModelConfig.from_hf(changed("deepseek-v3", rope_scaling=None, rope_parameters=rope | {key: value}))
