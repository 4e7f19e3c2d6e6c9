"""Tiny configs with deliberately unequal head sizes, so that a wrong split cannot pass."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from rorqual.model.config import ModelConfig, RopeConfig
from rorqual.model.transformer import Transformer

DENSE = {
    "architecture": "LlamaForCausalLM",
    "vocab_size": 160,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
}
MLA = {
    "num_key_value_heads": 4,
    "head_dim": 0,
    "q_lora_rank": 24,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
    "rope_interleave": True,
}
EXPERTS = {
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "first_k_dense_replace": 1,
}
V3 = {
    "architecture": "DeepseekV3ForCausalLM",
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
}
YARN = RopeConfig(
    rope_type="yarn", factor=8.0, original_max_position_embeddings=16, mscale=0.707, mscale_all_dim=0.707
)


def tiny(family: str = "deepseek", **changes: Any) -> ModelConfig:
    """A few hundred thousand parameters of either family."""
    base = DENSE if family == "llama" else {**DENSE, **MLA, **EXPERTS, **V3}
    return ModelConfig(**{**base, **changes})


@pytest.fixture
def make_config() -> Callable[..., ModelConfig]:
    return tiny


@pytest.fixture
def make_model() -> Callable[..., Transformer]:
    def make(family: str = "deepseek", seed: int = 0, **changes: Any) -> Transformer:
        config = tiny(family, **{"initializer_range": 0.15, **changes})
        model = Transformer(config).init_weights(seed).eval()
        generator = torch.Generator().manual_seed(seed + 1)
        for _, router in model.routers():
            if router.e_score_correction_bias is not None:
                router.e_score_correction_bias.normal_(0, 0.2, generator=generator)
        return model

    return make


@pytest.fixture
def yarn() -> RopeConfig:
    return YARN
