"""Frequencies, layouts and temperatures, by hand and from the published configs."""

import dataclasses
import math

import pytest
import torch

from rorqual.model.config import ModelConfig, RopeConfig
from rorqual.model.published import published
from rorqual.model.rope import (
    attention_factor,
    inv_freq,
    mscale,
    rotate_half,
    rotate_interleaved,
    softmax_scale,
)


def complex_rotation(x: torch.Tensor, position: int, theta: float) -> torch.Tensor:
    """Pairs (0,1), (2,3), … as complex numbers times e^(i * position * theta^(-2k/d))."""
    d = x.shape[-1]
    angle = position * theta ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    z = torch.view_as_complex(x.double().reshape(-1, 2)) * torch.polar(torch.ones_like(angle), angle)
    return torch.view_as_real(z).flatten()


def cos_sin(position: int, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = position * inv_freq(RopeConfig(), dim)
    return angle.cos(), angle.sin()


def test_interleaved_layout_is_the_complex_rotation() -> None:
    """vllm-project/vllm#26995: the pairs are neighbours, not halves."""
    q = torch.arange(8.0)
    out = rotate_interleaved(q[None], *cos_sin(1, 8))[0]
    assert torch.allclose(out.double(), complex_rotation(q, 1, 10000.0), atol=1e-5)


def test_half_layout_is_the_same_rotation_of_permuted_dimensions() -> None:
    q = torch.randn(8)
    permuted = torch.cat((q[0::2], q[1::2]))
    out = rotate_half(permuted[None], *cos_sin(3, 8))[0]
    want = complex_rotation(q, 3, 10000.0)
    assert torch.allclose(out.double(), torch.cat((want[0::2], want[1::2])), atol=1e-5)


def test_families_pick_their_layout(make_model) -> None:
    assert make_model("deepseek").layers[0].self_attn.rotate is rotate_interleaved
    assert make_model("deepseek", rope_interleave=False).layers[0].self_attn.rotate is rotate_half


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        # huggingface/transformers#47435: 192^-0.5 * m^2 with m = 0.1 * 0.707 * ln 40 + 1 and 0.1 * ln 40 + 1
        ("deepseek-v2-lite", 0.1147214),
        ("deepseek-v3", 192**-0.5 * 1.87385),
    ],
)
def test_softmax_scale_carries_mscale_squared(name: str, scale: float, make_model) -> None:
    assert softmax_scale(published(name)) == pytest.approx(scale, abs=1e-6)


def test_mscale_by_hand() -> None:
    assert mscale(40, 0.707) == pytest.approx(1.26080, abs=1e-5)
    assert mscale(40) == pytest.approx(1.36889, abs=1e-5)
    assert mscale(1) == mscale(0.5) == 1


def test_equal_mscales_leave_cos_and_sin_alone() -> None:
    assert attention_factor(published("deepseek-v2-lite").rope) == 1
    alone = RopeConfig(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096)
    assert attention_factor(alone) == pytest.approx(1.36889, abs=1e-5)


def test_yarn_keeps_fast_dimensions_and_stretches_slow_ones() -> None:
    rope = published("deepseek-v2-lite").rope
    plain, scaled = inv_freq(RopeConfig(), 64), inv_freq(rope, 64)
    low = math.floor(64 * math.log(4096 / (32 * 2 * math.pi)) / (2 * math.log(10000)))
    high = math.ceil(64 * math.log(4096 / (2 * math.pi)) / (2 * math.log(10000)))
    assert torch.equal(scaled[: low + 1], plain[: low + 1])
    assert torch.allclose(scaled[high:], plain[high:] / 40)


def test_frequencies_do_not_know_the_length_of_a_run(make_config, yarn: RopeConfig) -> None:
    """NVIDIA/Megatron-LM#1418: only the checkpoint's rope config counts."""
    configs = [make_config(max_position_embeddings=n, rope=yarn) for n in (512, 4096, 32768)]
    freqs = [inv_freq(c.rope, c.rotary_dim) for c in configs]
    assert torch.equal(freqs[0], freqs[1])
    assert torch.equal(freqs[0], freqs[2])


def test_frequencies_stay_float32_in_a_bfloat16_model(make_model) -> None:
    model = make_model("llama").to(torch.bfloat16)
    assert model.inv_freq.dtype == torch.float32
    assert torch.equal(model.inv_freq, inv_freq(RopeConfig(), 12))


def test_linear_scaling_divides() -> None:
    assert torch.allclose(
        inv_freq(RopeConfig(rope_type="linear", factor=4.0), 8), inv_freq(RopeConfig(), 8) / 4
    )


def test_old_and_new_rope_keys_read_alike() -> None:
    old = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 8,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "max_position_embeddings": 64,
        "rope_theta": 5000.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    }
    new = {k: v for k, v in old.items() if not k.startswith("rope_")}
    new["rope_parameters"] = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
    a, b = ModelConfig.from_hf(old), ModelConfig.from_hf(new)
    assert a == b
    assert dataclasses.asdict(a.rope)["rope_theta"] == 5000.0
