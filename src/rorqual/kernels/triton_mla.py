"""Absorbed MLA attention over a paged latent cache in Triton, for CUDA: the twin of `mla_attention`.

One program a query row and a block of heads. It walks over the row's blocks of cache once: each cached row is the key
for all heads and, by its first C values, their value too, so it is read once for both products (flash decoding,
arXiv 2205.14135, with DeepSeek-V2's latent for keys and values).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from rorqual.kernels.paged import PagedRows

TOKENS = 32  # cached rows of a step: with 576 values each, keys and scores fit an SM's shared memory


@triton.jit  # type: ignore[untyped-decorator]
def _mla_kernel(  # type: ignore[no-untyped-def]
    q, cache, table, request, length, out, scale, heads, blocks,
    q_row, q_head, cache_row, out_row, out_head,
    rank: tl.constexpr, rope: tl.constexpr, block_size: tl.constexpr,
    HEADS: tl.constexpr, TOKENS: tl.constexpr, RANK: tl.constexpr, ROPE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at_rank, at_rope = tl.arange(0, RANK), tl.arange(0, ROPE)
    is_head, is_rank, is_rope = head < heads, at_rank < rank, at_rope < rope
    start = q + row * q_row + head[:, None] * q_head
    q_latent = tl.load(start + at_rank[None, :], mask=is_head[:, None] & is_rank[None, :], other=0.0)
    q_rope = tl.load(start + rank + at_rope[None, :], mask=is_head[:, None] & is_rope[None, :], other=0.0)
    count = tl.load(length + row)
    owner = tl.load(request + row)
    best = tl.full((HEADS,), float("-inf"), tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    acc = tl.zeros((HEADS, RANK), tl.float32)
    for begin in range(0, count, TOKENS):
        token = begin + tl.arange(0, TOKENS)
        seen = token < count
        block = tl.load(table + owner * blocks + token // block_size, mask=seen, other=0)
        slot = block.to(tl.int64) * block_size + token % block_size
        rows = cache + slot[:, None] * cache_row
        latent = tl.load(rows + at_rank[None, :], mask=seen[:, None] & is_rank[None, :], other=0.0)
        turned = tl.load(rows + rank + at_rope[None, :], mask=seen[:, None] & is_rope[None, :], other=0.0)
        scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
        scores += tl.dot(q_rope, tl.trans(turned), input_precision="ieee")
        scores = tl.where(seen[None, :], scores * scale, float("-inf"))
        new = tl.maximum(best, tl.max(scores, 1))
        shrink = tl.exp(best - new)
        weights = tl.exp(scores - new[:, None])
        total = total * shrink + tl.sum(weights, 1)
        acc = acc * shrink[:, None] + tl.dot(weights.to(latent.dtype), latent, input_precision="ieee")
        best = new
    # A row that sees nothing gives zeros.
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    where = out + row * out_row + head[:, None] * out_head + at_rank[None, :]
    tl.store(where, acc, mask=is_head[:, None] & is_rank[None, :])


def mla_attention_triton(q: Tensor, cache: Tensor, rows: PagedRows, rank: int, scale: float) -> Tensor:
    """q [N, H, C + R], cache [slots, C + R] of float32, float16 or bfloat16 → [N, H, C] float32."""
    n, heads, width = q.shape
    q = q.to(cache.dtype).contiguous()
    out = torch.empty(n, heads, rank, dtype=torch.float32, device=q.device)
    per = 16  # heads of a program: the smallest that tensor cores multiply
    _mla_kernel[(n, -(-heads // per))](
        q, cache, rows.table, rows.request, rows.length, out, scale, heads, rows.table.shape[1],
        q.stride(0), q.stride(1), cache.stride(0), out.stride(0), out.stride(1),
        rank, width - rank, rows.block_size,
        per, TOKENS, triton.next_power_of_2(rank), max(16, triton.next_power_of_2(width - rank)),
    )  # fmt: skip
    return out
