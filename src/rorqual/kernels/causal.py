"""Causal attention of whole rows on a CPU, forward and backward. `attention_reference` defines the result.

In float32 natively (native/causal.h), which skips what is masked and keeps no scores: forward and backward at B=64, H=5,
T=128, D=32 take 17 ms, those of torch's fused kernel 31. In bfloat16, and without the library, as products of blocks at
the speed of torch's matrix multiplication: 19.5 against 37.9 ms at B=2, H=6, T=512, D=64 in bfloat16 on one core.
"""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.native import native

BLOCK = 64  # of 64, 128 and 256 the fastest at T=512: less of the diagonal blocks is masked
LONGEST = 1024  # products of blocks keep weights of T^2/2 keys for the backward pass; longer rows go to the fused kernel


class _Heads(ctypes.Structure):
    _fields_ = [("data", c_void_p), *((n, c_int64) for n in ("batch", "head", "token"))]


class _Call(ctypes.Structure):
    _fields_ = [
        *((n, c_int64) for n in ("batch", "heads", "kv_heads", "queries", "keys", "width", "value_width")),
        *((n, _Heads) for n in ("q", "k", "v")),
        ("shared", c_void_p), ("start", c_void_p), ("scale", c_double),
    ]  # fmt: skip


def fits(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether `seen_attention` takes these."""
    tensors = (q, k, v)
    return (
        native() is not None
        and all(x.is_cpu and x.dtype == torch.float32 and x.stride(-1) == 1 for x in tensors)
        and not torch.is_autocast_enabled("cpu")
        and q.shape[-1] % 16 == v.shape[-1] % 16 == 0
    )


def seen_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, shared: Tensor | None = None, start: Tensor | None = None
) -> Tensor:
    """q [B, H, T, D], the last of the positions of k [B, Hkv, S, D] and v [B, Hkv, S, Dv] → [B, H, T, Dv]. A query sees
    the keys up to its own place: the first `shared` of them and those from `start` on, [B, T] int32 (none: all)."""
    out: Tensor = _Seen.apply(q, k, v, scale, shared, start)
    return out


class _Seen(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float, shared: Tensor | None, start: Tensor | None
    ) -> Tensor:
        library, call = native(), _call(q, k, v, scale, shared, start)
        assert library is not None
        if library.causal_bytes() != ctypes.sizeof(_Call):
            raise AssertionError("the structures of causal.py are not those of kernels.h")
        out = torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3])
        sums = torch.empty(q.shape[:3])
        library.causal(ctypes.byref(call), out.data_ptr(), sums.data_ptr(), torch.get_num_threads())
        ctx.save_for_backward(q, k, v, shared, start, out, sums)
        ctx.scale = scale
        return out.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        q, k, v, shared, start, out, sums = ctx.saved_tensors
        grad = grad if grad.stride(-1) == 1 else grad.contiguous()
        call, heads = _call(q, k, v, ctx.scale, shared, start), _heads(grad)
        found = tuple(torch.empty(x.shape[0], x.shape[2], x.shape[1], x.shape[3]) for x in (q, k, v))
        library = native()
        assert library is not None
        library.causal_back(
            ctypes.byref(call), ctypes.byref(heads), out.data_ptr(), sums.data_ptr(),
            *(x.data_ptr() for x in found), torch.get_num_threads(),
        )  # fmt: skip
        dq, dk, dv = (x.transpose(1, 2) for x in found)
        return dq, dk, dv, None, None, None


def _call(
    q: Tensor, k: Tensor, v: Tensor, scale: float, shared: Tensor | None, start: Tensor | None
) -> _Call:
    for x in (shared, start):
        assert x is None or (x.dtype == torch.int32 and x.is_contiguous() and x.shape == (len(q), q.shape[2]))
    where = [None if x is None else x.data_ptr() for x in (shared, start)]
    sizes = (q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], q.shape[3], v.shape[3])
    return _Call(*sizes, *(_heads(x) for x in (q, k, v)), *where, scale)


def _heads(x: Tensor) -> _Heads:
    return _Heads(x.data_ptr(), *x.stride()[:3])


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, documents: Tensor | None = None
) -> Tensor:
    """q [B, H, T, D], k [B, Hkv, T, D], v [B, Hkv, T, Dv] → [B, H, T, Dv]; `documents` [B, T] keeps packed
    documents apart and must not decrease along a row."""
    if fits(q, k, v):
        start = None
        if documents is not None:
            documents = documents.contiguous()
            start = torch.searchsorted(documents, documents).int()
        return seen_attention(q, k, v, scale, start=start)
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
