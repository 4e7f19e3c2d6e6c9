"""Grouped-query attention over paged keys and values, for decoding and for chunks of a prompt alike.

q [N, H, D], keys and values [slots, Hkv, D] float32 or bfloat16, or uint8 rows of `paged.round_rows`
→ [N, H, D] float32. A query row that sees no key gives zeros.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.attention import attention_reference
from rorqual.kernels.native import TYPES, native
from rorqual.kernels.paged import PagedRows, cached_values


def gqa_attention_reference(q: Tensor, keys: Tensor, values: Tensor, rows: PagedRows, scale: float) -> Tensor:
    """The definition: one query row after the other."""
    out = torch.zeros(q.shape, device=q.device)
    for i in range(len(q)):
        k, v = (cached_values(x[rows.slots(i)], q.shape[-1]).transpose(0, 1)[None] for x in (keys, values))
        if k.shape[2]:
            out[i] = attention_reference(q[i].float()[None, :, None], k, v, scale)[0, :, 0]
    return out


def gqa_attention(q: Tensor, keys: Tensor, values: Tensor, rows: PagedRows, scale: float) -> Tensor:
    """Natively where the library is there and knows the cache's type."""
    library = native()
    if library is None or keys.dtype not in TYPES or keys.device.type != "cpu" or not keys.is_contiguous():
        return gqa_attention_reference(q, keys, values, rows, scale)
    assert values.dtype == keys.dtype
    assert values.shape == keys.shape
    q = q.float().contiguous()
    n, heads, width = q.shape
    out = torch.empty(n, heads, width)
    library.gqa(
        q.data_ptr(), rows.request.data_ptr(), rows.length.data_ptr(), n, heads, scale,
        keys.data_ptr(), values.data_ptr(), TYPES[keys.dtype], keys.stride(0) * keys.element_size(),
        rows.block_size, rows.table.data_ptr(), rows.table.shape[1], keys.shape[1], width,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out
