"""Absorbed attention of single new tokens over a paged latent cache.

q [B, H, C + R] float32 in latent space; cache [slots, C + R]; slots: the cache rows of each request, oldest first
→ [B, H, C] float32. A request without rows gives zeros.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rorqual.kernels.attention import attention_reference
from rorqual.kernels.native import library


def mla_decode_reference(
    q: Tensor, cache: Tensor, slots: Sequence[Tensor], rank: int, scale: float
) -> Tensor:
    """The definition: one request after the other."""
    out = torch.zeros(*q.shape[:2], rank)
    for i, rows in enumerate(slots):
        if len(rows):
            keys = cache[rows].float()[None, None]
            out[i] = attention_reference(q[i].float()[None, :, None], keys, keys[..., :rank], scale)[0, :, 0]
    return out


def supported(cache: Tensor, rank: int) -> bool:
    """Whether the native kernel takes this cache: bfloat16 rows of a multiple of 32, on the CPU, library present."""
    fits = cache.dtype == torch.bfloat16 and cache.shape[1] % 32 == 0 and rank % 16 == 0
    return fits and cache.device.type == "cpu" and library() is not None


def mla_decode(q: Tensor, cache: Tensor, table: Tensor, offsets: Tensor, rank: int, scale: float) -> Tensor:
    """Natively, for a cache that is `supported`. table: the slots of all requests, one after the other;
    offsets [B + 1] int64: where each request's begin."""
    native = library()
    assert native is not None
    n, heads, width = q.shape
    out = torch.empty(n, heads, rank)
    # enough parts that every thread has some even for one request, but each of a few tiles
    longest = int((offsets[1:] - offsets[:-1]).max())
    parts = max(1, min(-(-4 * torch.get_num_threads() // n), longest // 256))
    q = q.float().contiguous()
    native.call("mla_decode", q, cache, table, offsets, out, n, heads, rank, width, float(scale), parts)
    return out
