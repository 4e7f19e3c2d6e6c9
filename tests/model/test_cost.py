"""The published arithmetic. Sources: DeepSeek-V2 (arXiv 2405.04434, sections 2.1.4 and 3.1), DeepSeek-V3
(arXiv 2412.19437, abstract), the model cards of V2-Lite and DeepSeek 67B."""

import pytest
import torch

from rorqual.model.config import ModelConfig
from rorqual.model.cost import cost
from rorqual.model.published import published
from rorqual.model.transformer import Transformer


@pytest.mark.parametrize(
    ("name", "billions", "active", "elements", "cache_bytes"),
    [
        ("deepseek-v2-lite", 15.7, 2.4, 15_552, 31_104),
        ("deepseek-v2", 236, 21, 34_560, 69_120),
        ("deepseek-v3", 671, 37, 35_136, 70_272),
    ],
)
def test_published_sizes(name: str, billions: float, active: float, elements: int, cache_bytes: int) -> None:
    c = cost(published(name))
    assert c.parameters / 1e9 == pytest.approx(billions, rel=0.003)
    assert c.active / 1e9 == pytest.approx(active, rel=0.03)
    assert c.cache_elements == elements
    assert c.cache_bytes() == cache_bytes


def test_v3_mtp_module_is_counted_apart() -> None:
    """11.5B parameters of its own (DeepSeek-V3 repository, README_WEIGHTS)."""
    assert cost(published("deepseek-v3")).mtp / 1e9 == pytest.approx(11.5, rel=0.02)


def test_cache_saving_against_deepseek_67b() -> None:
    """67B: 95 layers, 8 key-value heads of 128. 82.2% at equal precision, 93.3% with 6-bit elements."""
    dense = 95 * 8 * 2 * 128
    assert dense == 194_560
    v2 = cost(published("deepseek-v2"))
    assert 1 - v2.cache_elements / dense == pytest.approx(0.822, abs=5e-4)
    assert 1 - v2.cache_bytes(6) / (dense * 2) == pytest.approx(0.933, abs=5e-4)


def test_multi_head_equivalent_of_v2_lite() -> None:
    """LMCache/LMCache#694: 276,480 bytes a token in bf16, 8.9 times the latent cache."""
    c = cost(published("deepseek-v2-lite"))
    assert 2 * c.cache_elements_with(16) == 276_480


def test_v2_lite_weights_need_31_gigabytes() -> None:
    assert cost(published("deepseek-v2-lite")).weight_bytes(16) / 1e9 == pytest.approx(31.4, abs=0.1)


def test_smollm2_parameters() -> None:
    """134,515,008 (the packaged GGUF's own count)."""
    assert cost(published("smollm2-135m")).parameters == 134_515_008


def test_flops_by_hand() -> None:
    """One dense layer: 2 FLOPs a weight; training three times that; causal attention sees half the row."""
    c = cost(
        ModelConfig(
            architecture="LlamaForCausalLM",
            vocab_size=100,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
        )
    )
    weights = 32 * (32 + 16 + 16 + 32) + 3 * 32 * 64 + 32 * 100
    assert c.matmul == weights
    assert c.decode_flops(10) == 2 * weights + 2 * 4 * (8 + 8) * 10
    assert c.train_flops(20) == 3 * c.decode_flops(10)


def test_tables_are_parameters_without_flops() -> None:
    base = published("smollm2-135m")
    plain = cost(base)
    import dataclasses

    tabled = cost(
        dataclasses.replace(
            base,
            architecture="RorqualForCausalLM",
            ngram_table_size=1000,
            induction=4,
            value_embeddings=True,
            x0_residual=True,
        )
    )
    assert tabled.tables == 1000 * 576 + (49152 + 4) * 576 + 15 * 49152 * 192
    assert tabled.matmul - plain.matmul == 15 * 576  # the value embeddings' gates


def test_count_equals_an_allocated_model() -> None:
    config = ModelConfig(
        architecture="DeepseekV3ForCausalLM",
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    )
    model = Transformer(config)
    assert cost(config).parameters == sum(p.numel() for p in model.parameters())
    assert cost(config).active == cost(config).parameters - 64 * 32 - 2 * 3 * 32 * 16
    assert all(p.dtype == torch.float32 for p in model.parameters())
