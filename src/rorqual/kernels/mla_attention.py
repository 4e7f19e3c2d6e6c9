"""Absorbed MLA attention over a paged latent cache, for decoding and for chunks of a prompt alike.

q [N, H, C + R] in latent space, cache [slots, C + R] float32 or bfloat16, or uint8 rows of `paged.round_rows`
→ [N, H, C] float32: softmax(scale * q · row) over the rows that each query row sees, times their first C values.
A query row that sees none gives zeros (ikawrakow/ik_llama.cpp#2344). With a cache below float32 the query and the
softmax's weights are rounded to bfloat16 where the processor multiplies that natively.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.attention import attention_reference
from rorqual.kernels.native import TYPES, native
from rorqual.kernels.paged import PagedRows, cached_values
from rorqual.kernels.triton import has_triton


def mla_attention_reference(q: Tensor, cache: Tensor, rows: PagedRows, rank: int, scale: float) -> Tensor:
    """The definition: one query row after the other."""
    out = torch.zeros(*q.shape[:2], rank, device=q.device)
    for i in range(len(q)):
        keys = cached_values(cache[rows.slots(i)], q.shape[-1])[None, None]
        if keys.shape[2]:
            out[i] = attention_reference(q[i].float()[None, :, None], keys, keys[..., :rank], scale)[0, :, 0]
    return out


def mla_attention(q: Tensor, cache: Tensor, rows: PagedRows, rank: int, scale: float) -> Tensor:
    """Natively where the library is there and knows the cache's type; in Triton on CUDA."""
    if q.is_cuda and cache.dtype != torch.uint8 and has_triton():
        from rorqual.kernels.triton_mla import mla_attention_triton

        return mla_attention_triton(q, cache, rows, rank, scale)
    library = native()
    if library is None or cache.dtype not in TYPES or cache.device.type != "cpu" or not cache.is_contiguous():
        return mla_attention_reference(q, cache, rows, rank, scale)
    q = q.float().contiguous()
    n, heads, width = q.shape
    out = torch.empty(n, heads, rank)
    library.mla(
        q.data_ptr(), rows.request.data_ptr(), rows.length.data_ptr(), n, heads, scale,
        cache.data_ptr(), TYPES[cache.dtype], cache.stride(0) * cache.element_size(), rows.block_size,
        rows.table.data_ptr(), rows.table.shape[1], rank, width, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out
