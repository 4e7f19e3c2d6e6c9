"""Rotary position embedding in both layouts, with linear, Llama-3 and YaRN scaling.

Frequencies depend on the checkpoint's rope config alone, never on the length of a run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels import rope as rope_kernel
from rorqual.model.config import ModelConfig, RopeConfig


def inv_freq(rope: RopeConfig, dim: int) -> Tensor:
    """Angular frequencies [dim/2] in float32 for `dim` rotated dimensions."""
    freq = 1.0 / (rope.rope_theta ** (torch.arange(0, dim, 2, dtype=torch.float32) / dim))
    if rope.rope_type == "linear":
        return freq / rope.factor
    if rope.rope_type == "yarn":
        return _yarn(freq, rope, dim)
    if rope.rope_type == "llama3":
        return _llama3(freq, rope)
    return freq


def _yarn(freq: Tensor, rope: RopeConfig, dim: int) -> Tensor:
    """Slow rotations are interpolated, fast ones kept, a ramp between (arXiv 2309.00071, section 3.2)."""
    context = rope.original_max_position_embeddings
    assert context is not None

    def dimension(rotations: float) -> float:
        """The dimension whose wave makes this many rotations over the original context."""
        wave = context / (rotations * 2 * math.pi)
        return dim * math.log(wave) / (2 * math.log(rope.rope_theta))

    low = max(math.floor(dimension(rope.beta_fast)), 0)
    high: float = min(math.ceil(dimension(rope.beta_slow)), dim - 1)
    if low == high:
        high += 0.001  # a ramp of no width would divide by zero
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    return freq / rope.factor * ramp + freq * (1 - ramp)


def _llama3(freq: Tensor, rope: RopeConfig) -> Tensor:
    """Waves longer than the original context are stretched, with a smooth passage (the Llama 3.1 release)."""
    assert rope.original_max_position_embeddings is not None
    wavelength = 2 * math.pi / freq
    long = rope.original_max_position_embeddings / rope.low_freq_factor
    short = rope.original_max_position_embeddings / rope.high_freq_factor
    smooth = (rope.original_max_position_embeddings / wavelength - rope.low_freq_factor) / (
        rope.high_freq_factor - rope.low_freq_factor
    )
    mixed = (1 - smooth) * freq / rope.factor + smooth * freq
    return torch.where(wavelength > long, freq / rope.factor, torch.where(wavelength < short, freq, mixed))


def mscale(factor: float, weight: float = 1.0) -> float:
    """YaRN's temperature: 0.1 * weight * ln(factor) + 1, and 1 where nothing is stretched."""
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0


def attention_factor(rope: RopeConfig) -> float:
    """What cos and sin are multiplied by: 1 but for YaRN, where the two mscales differ or are absent."""
    if rope.rope_type != "yarn":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return mscale(rope.factor, rope.mscale) / mscale(rope.factor, rope.mscale_all_dim)
    return mscale(rope.factor)


def softmax_scale(config: ModelConfig) -> float:
    """1/sqrt(query head width), times mscale_all_dim's temperature squared for DeepSeek models."""
    scale = config.qk_head_dim**-0.5
    if config.attention == "mla" and config.rope.rope_type != "default" and config.rope.mscale_all_dim:
        scale *= mscale(config.rope.factor, config.rope.mscale_all_dim) ** 2
    return scale


def rotate_interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (0,1), (2,3), … of x [*L, H, R] by cos, sin [*L, R/2] (DeepSeek's layout)."""
    return _rotated(_interleaved, x, cos, sin)


def rotate_half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of x [*L, H, D] by cos, sin [*L, D/2] (the Llama layout)."""
    return _rotated(_half, x, cos, sin)


def _interleaved(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if rope_kernel.fits(x, cos):
        return rope_kernel.rope(x, cos, sin, interleaved=True)
    return interleaved_reference(x, cos, sin)


def _half(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if rope_kernel.fits(x, cos):
        return rope_kernel.rope(x, cos, sin, interleaved=False)
    return half_reference(x, cos, sin)


def interleaved_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition."""
    # (even + i odd) (cos + i sin): the same products and sums as written out, in one pass over neighbours
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)).contiguous())
    turn = torch.complex(cos, sin).unsqueeze(-2)
    return torch.view_as_real(pairs * turn).flatten(-2).to(x.dtype)


def half_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The definition."""
    first, second = x.float().chunk(2, -1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1).to(x.dtype)


Rotate = Callable[[Tensor, Tensor, Tensor], Tensor]


def _rotated(rotate: Rotate, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    if not torch.is_grad_enabled():
        return rotate(x, cos, sin)
    out: Tensor = _Rotation.apply(rotate, x, cos, sin)
    return out


class _Rotation(torch.autograd.Function):
    """A rotation's gradient is the rotation back: one pass instead of the gradients of its slices and products."""

    @staticmethod
    def forward(ctx: Any, rotate: Rotate, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.rotate = rotate
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return None, ctx.rotate(grad, cos, -sin), None, None
