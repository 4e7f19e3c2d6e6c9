"""Tiny models of both families for the engine."""

import dataclasses
from collections.abc import Callable

import pytest

from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "eos_token_id": None,
}
MLA = ModelConfig(
    architecture="DeepseekV3ForCausalLM",
    num_key_value_heads=4,
    kv_lora_rank=12,
    q_lora_rank=None,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=10,
    rope_interleave=True,
    n_routed_experts=6,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    first_k_dense_replace=1,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    norm_topk_prob=True,
    **SIZES,
)
QWEN = ModelConfig(architecture="Qwen3ForCausalLM", num_key_value_heads=2, head_dim=8, qk_norm=True, **SIZES)
GQA = dataclasses.replace(  # with everything of ours, so that the engine carries what looks back over tokens
    QWEN,
    architecture="RorqualForCausalLM",
    logit_softcap=15.0,
    value_embeddings=True,
    ngram_table_size=64,
    triple_table_size=96,
    induction=3,
    x0_residual=True,
    smear=True,
)
CONFIGS = {"mla": MLA, "gqa": GQA, "qwen": QWEN}


@pytest.fixture(scope="session")
def models() -> dict[str, Transformer]:
    return {name: Transformer(config).init_weights(1).eval() for name, config in CONFIGS.items()}


@pytest.fixture(params=["mla", "gqa"])
def model(request: pytest.FixtureRequest, models: dict[str, Transformer]) -> Transformer:
    return models[request.param]


@pytest.fixture
def fresh() -> Callable[[str, int], Transformer]:
    return lambda name, seed: Transformer(CONFIGS[name]).init_weights(seed).eval()
