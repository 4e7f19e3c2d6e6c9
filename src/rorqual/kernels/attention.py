"""Softmax attention: the plain definition and torch's fused form.

Shapes: q [B, H, T, D], k [B, Hkv, S, D], v [B, Hkv, S, Dv], mask [B or 1, 1, T, S] true where a key may be
seen. A row that may see no key gives zeros, never NaN (ikawrakow/ik_llama.cpp#2344).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention_reference(q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
    """The definition, softmax in float32 → [B, H, T, Dv]."""
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    scores = (q @ k.mT).float() * scale
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    peak = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).min)  # finite for a row of -inf
    weights = (scores - peak).exp()
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return weights.to(v.dtype) @ v


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None, causal: bool = False
) -> Tensor:
    """torch's fused attention for the same contract. `causal` is for T == S without a mask.

    The CPU kernel wants values as wide as keys, so narrower ones are padded with zeros and cut again.
    """
    width, wide = v.shape[-1], q.shape[-1]
    if width < wide:
        v = F.pad(v, (0, wide - width))
    elif width > wide:
        q, k = F.pad(q, (0, width - wide)), F.pad(k, (0, width - wide))
    out = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[..., :width]
