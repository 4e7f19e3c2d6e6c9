"""A tiny DeepSeek-V3-like checkpoint on disk."""

from collections.abc import Callable
from pathlib import Path

import pytest

from rorqual.checkpoint import hf
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer

TINY = ModelConfig(
    architecture="DeepseekV3ForCausalLM",
    vocab_size=160,
    hidden_size=48,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=24,
    kv_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    rope_interleave=True,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    first_k_dense_replace=1,
    scoring_func="sigmoid",
    topk_method="noaux_tc",
    norm_topk_prob=True,
    routed_scaling_factor=2.5,
    max_position_embeddings=128,
    num_nextn_predict_layers=1,
    bos_token_id=0,
    eos_token_id=1,
)


@pytest.fixture
def tiny() -> Transformer:
    model = Transformer(TINY).init_weights(0).eval()
    for _, router in model.routers():
        assert router.e_score_correction_bias is not None
        router.e_score_correction_bias.uniform_(-1, 1)
    return model


@pytest.fixture
def saved(tiny: Transformer, tmp_path: Path) -> Path:
    hf.save_model(tiny, tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def run() -> Callable[..., int]:
    """The command line, in this process."""
    from rorqual.cli import main

    def call(*arguments: object) -> int:
        return main([str(a) for a in arguments])

    return call
