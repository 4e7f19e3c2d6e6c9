"""One matrix product per expert over rows sorted by expert, in Triton, for CUDA: the twin of `grouped_linear`.

A program computes a tile of rows of one expert and of outputs. Tiles are dealt out over all experts at once; each program
finds its expert by counting the tiles of those before it, so an expert without rows costs nothing.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, OUTPUTS, INNER = 32, 64, 64  # of a tile: fine-grained experts see few rows each


@triton.jit  # type: ignore[untyped-decorator]
def _grouped_kernel(  # type: ignore[no-untyped-def]
    x, weight, ends, out, experts, inner, outputs, x_row, w_expert, w_row, out_row,
    ROWS: tl.constexpr, OUTPUTS: tl.constexpr, INNER: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0)
    start, before, expert = 0, 0, tile * 0
    found_start, found_end, found_tile = 0, 0, 0
    for e in range(experts):
        end = tl.load(ends + e)
        tiles = (end - start + ROWS - 1) // ROWS
        here = (tile >= before) & (tile < before + tiles)
        expert = tl.where(here, e, expert)
        found_start = tl.where(here, start, found_start)
        found_end = tl.where(here, end, found_end)
        found_tile = tl.where(here, tile - before, found_tile)
        before += tiles
        start = end
    row = found_start + found_tile * ROWS + tl.arange(0, ROWS)
    column = tl.program_id(1) * OUTPUTS + tl.arange(0, OUTPUTS)
    is_row, is_column = row < found_end, column < outputs
    acc = tl.zeros((ROWS, OUTPUTS), tl.float32)
    for begin in range(0, inner, INNER):
        at = begin + tl.arange(0, INNER)
        is_at = at < inner
        left = tl.load(
            x + row[:, None] * x_row + at[None, :], mask=is_row[:, None] & is_at[None, :], other=0.0
        )
        right = tl.load(
            weight + expert.to(tl.int64) * w_expert + column[:, None] * w_row + at[None, :],
            mask=is_column[:, None] & is_at[None, :],
            other=0.0,
        )
        acc += tl.dot(left, tl.trans(right), input_precision="ieee")
    where = out + row[:, None] * out_row + column[None, :]
    tl.store(where, acc.to(out.dtype.element_ty), mask=is_row[:, None] & is_column[None, :])


def grouped_linear_triton(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """x [M, in], weight [E, out, in] of one dtype, ends [E] int32 → [M, out]."""
    x, weight = x.contiguous(), weight.contiguous()
    (m, inner), (experts, outputs, _) = x.shape, weight.shape
    out = torch.empty(m, outputs, dtype=x.dtype, device=x.device)
    if not m:
        return out
    tiles = min(experts, m) + m // ROWS  # no more than that, whatever the shares
    _grouped_kernel[(tiles, -(-outputs // OUTPUTS))](
        x, weight, ends, out, experts, inner, outputs, x.stride(0), weight.stride(0), weight.stride(1), out.stride(0),
        ROWS, OUTPUTS, INNER,
    )  # fmt: skip
    return out
