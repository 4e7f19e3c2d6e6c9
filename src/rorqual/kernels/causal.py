"""Causal attention of whole rows for training on a CPU: blocks of queries against the keys that they may see.

torch's fused CPU kernel runs at the same 37 GFLOP/s in float32 and bfloat16; products of blocks run at the
speed of matrix multiplication and skip what is masked: 19.5 against 37.9 ms forward and backward at B=2, H=6,
T=512, D=64 in bfloat16 on one core, 25 against 38 ms in float32. `attention_reference` defines the
result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BLOCK = 64  # of 64, 128 and 256 the fastest at T=512: less of the diagonal blocks is masked
LONGEST = 1024  # the weights of T^2/2 keys are kept for the backward pass; longer rows go to the fused kernel


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None = None
) -> Tensor:
    """q [B, H, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv] → [B, H, T, Dv]; `documents` [B, T] keeps packed
    documents apart and must not decrease along a row."""
    batch, heads, length, _ = q.shape
    groups = heads // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    if torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    with torch.autocast(q.device.type, enabled=False):
        flat = (x.reshape(batch * heads, length, -1) for x in (q, k, v))
        out: Tensor = _Blocked.apply(*flat, scale, documents)
    return out.view(batch, heads, length, -1)


def _spans(length: int, documents: Tensor | None) -> list[tuple[int, int, int]]:
    """(first key, first query, end) of each block; keys before the block's earliest document are left out."""
    starts = list(range(0, length, BLOCK))
    if documents is None:
        return [(0, s, min(s + BLOCK, length)) for s in starts]
    opening = documents[:, starts]
    first = torch.searchsorted(documents.contiguous(), opening.contiguous()).amin(0).tolist()
    return [(k, s, min(s + BLOCK, length)) for k, s in zip(first, starts, strict=True)]


def _later(size: int) -> Tensor:
    """True above the diagonal [size, size]."""
    return torch.ones(size, size, dtype=torch.bool).triu(1)


def _barred(span: tuple[int, int, int], documents: Tensor, heads: int) -> Tensor:
    """True where a query of the block may not look [B * H, T, S]: later keys and other documents."""
    first, start, end = span
    barred = documents[:, start:end, None] != documents[:, None, first:end]
    barred[:, :, start - first :] |= _later(end - start)
    return barred.repeat_interleave(heads, 0)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None) -> Tensor:
        heads = 1 if documents is None else q.shape[0] // documents.shape[0]
        spans = _spans(q.shape[1], documents)
        q, across = q * scale, k.mT.contiguous()
        out = q.new_empty(*q.shape[:2], v.shape[2])
        kept = []
        for span in spans:
            first, start, end = span
            scores = torch.bmm(q[:, start:end], across[:, :, first:end])
            if documents is None:  # only the block on the diagonal has keys that are later
                scores[:, :, start - first :].masked_fill_(_later(end - start), float("-inf"))
            else:
                scores.masked_fill_(_barred(span, documents, heads), float("-inf"))
            weights = scores.softmax(-1)  # float32 inside, also where bfloat16 comes in and goes out
            out[:, start:end] = torch.bmm(weights, v[:, first:end])
            kept.append(weights)
        ctx.save_for_backward(q, k, v, *kept)
        ctx.scale, ctx.spans = scale, spans
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        q, k, v, *kept = ctx.saved_tensors
        dq, across = torch.empty_like(q), v.mT.contiguous()
        dk, dv = torch.zeros_like(k, dtype=torch.float32), torch.zeros_like(v, dtype=torch.float32)
        for (first, start, end), weights in zip(ctx.spans, kept, strict=True):
            g = grad[:, start:end]
            dv[:, first:end] += torch.bmm(weights.mT, g)
            dw = torch.bmm(g, across[:, :, first:end])
            ds = torch._softmax_backward_data(dw, weights, -1, weights.dtype)
            dq[:, start:end] = torch.bmm(ds, k[:, first:end])
            dk[:, first:end] += torch.bmm(ds.mT, q[:, start:end])
        return dq.mul_(ctx.scale), dk.to(k.dtype), dv.to(v.dtype), None, None
