"""Weights of 4 and 8 bits in groups of 32: packing, the plain definition, and native products.

A group's values are scale * (stored - offset), scale a half, offset 8 or 128: symmetric, 4.5 and 8.5 bits a weight with
the scale. Native products round their inputs to 8 bits in groups of 32 too, as llama.cpp does; `linear_reference` is
exact in the inputs, so the two agree to the rounding, under 1% of the output's norm.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.native import library

Bits = Literal[4, 8]
GROUP, LANES = 32, 16


def block_bytes(bits: int) -> int:
    """Bytes of a block of 16 outputs by 32 inputs: its values and 16 half scales."""
    return (256 if bits == 4 else 512) + 2 * LANES


def quantise(weight: Tensor, bits: int, importance: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """weight [out, in] → values [out, in] uint8 with the offset, scales [out, in / 32] float16.

    The scale of a group is searched around the largest value's for the least squared error, weighted by
    `importance` [in] (mean squares of the inputs) where it is given.
    """
    out, width = weight.shape
    groups = weight.float().view(out, width // GROUP, GROUP)
    cost = torch.ones(GROUP) if importance is None else importance.float().view(1, -1, GROUP)
    top = 7 if bits == 4 else 127
    offset = 8 if bits == 4 else 128
    peak = groups.abs().amax(-1, keepdim=True)
    # the largest value may take the extra negative step: its sign decides the scale's
    signed = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best_error = torch.full_like(peak, float("inf"))
    best_scale = torch.zeros_like(peak)
    best_values = torch.zeros_like(groups)
    tries = [-signed / (offset * f) for f in (0.8, 0.85, 0.9, 0.95, 1.0)] if bits == 4 else []
    tries += [peak / (top * f) for f in ((0.8, 0.9, 1.0, 1.1) if bits == 4 else (1.0,))]
    for scale in tries:
        scale = scale.half().float()
        safe = torch.where(scale == 0, torch.ones_like(scale), scale)
        values = (groups / safe).round().clamp(-offset, top)
        error = ((values * scale - groups).square() * cost).sum(-1, keepdim=True)
        better = error < best_error
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_values = torch.where(better, values, best_values)
    stored = (best_values + offset).to(torch.uint8).view(out, width)
    return stored, best_scale.squeeze(-1).half()


def dequantise(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The weights that stored values and scales stand for [out, in] float32."""
    offset = 8 if bits == 4 else 128
    wide = scales.float().repeat_interleave(GROUP, 1)
    return (values.float() - offset) * wide


def pack(values: Tensor, scales: Tensor, bits: int) -> Tensor:
    """Values [out, in] and scales [out, in / 32] → blocks [out / 16, in / 32, block_bytes] uint8, the kernels' layout."""
    out, width = values.shape
    v = values.view(out // LANES, LANES, width // GROUP, GROUP).transpose(1, 2)  # [O, G, 16, 32]
    if bits == 4:
        v = v.unflatten(-1, (4, 2, 4))  # k, low or high, byte
        v = v[..., 0, :] | (v[..., 1, :] << 4)  # [O, G, 16, 4, 4]
    else:
        v = v.unflatten(-1, (8, 4))
    body = v.transpose(2, 3).flatten(2)
    s = scales.view(out // LANES, LANES, -1).transpose(1, 2).contiguous().view(torch.uint8)
    return torch.cat((body, s.flatten(2) if s.dim() == 4 else s), -1).contiguous()


def unpack(blocks: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The reverse of `pack`."""
    rows, groups, _ = blocks.shape
    body, s = blocks[..., : -2 * LANES], blocks[..., -2 * LANES :].contiguous()
    scales = s.view(torch.float16).transpose(1, 2).reshape(rows * LANES, groups)
    if bits == 4:
        v = body.reshape(rows, groups, 4, LANES, 4)
        v = torch.stack((v & 15, v >> 4), 3)  # [O, G, k, low or high, 16, byte]
        v = v.permute(0, 4, 1, 2, 3, 5)
    else:
        v = body.reshape(rows, groups, 8, LANES, 4).permute(0, 3, 1, 2, 4)
    return v.reshape(rows * LANES, groups * GROUP), scales


def linear_reference(x: Tensor, blocks: Tensor, bits: int) -> Tensor:
    """x [N, in] times the dequantised weights → [N, out] float32: the definition."""
    return F.linear(x.float(), dequantise(*unpack(blocks, bits), bits))


def linear(x: Tensor, blocks: Tensor, bits: int) -> Tensor:
    """x [N, in] → [N, out] float32, natively where the library is there."""
    native = library()
    if native is None:
        return linear_reference(x, blocks, bits)
    x = x.float().contiguous()
    out = torch.empty(len(x), blocks.shape[0] * LANES)
    native.call("linear", x, blocks, out, len(x), x.shape[1], out.shape[1], bits)
    return out


def experts_reference(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, bits: int) -> Tensor:
    """x [N, D], ids and weights [N, K], up [E, 2f / 16, D / 32, …] (gate first), down [E, D / 16, f / 32, …] → [N, D]
    float32: the weighted sum of the chosen experts' SwiGLU. The definition."""
    out = torch.zeros(x.shape, dtype=torch.float32)
    for expert in ids.unique().tolist():
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, value = linear_reference(x[token], up[expert], bits).chunk(2, -1)
        y = linear_reference(F.silu(gate) * value, down[expert], bits)
        out.index_add_(0, token, y * weights[token, slot, None])
    return out


def experts(x: Tensor, ids: Tensor, weights: Tensor, up: Tensor, down: Tensor, bits: int) -> Tensor:
    """The same in one native call."""
    native = library()
    if native is None:
        return experts_reference(x, ids, weights, up, down, bits)
    n, k = ids.shape
    inner = up.shape[1] * LANES // 2
    out = torch.empty(x.shape, dtype=torch.float32)
    arguments = (x.float().contiguous(), ids.contiguous(), weights.float().contiguous(), up, down, out)
    native.call("experts", *arguments, n, k, len(up), x.shape[1], inner, bits)
    return out
