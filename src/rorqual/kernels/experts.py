"""Routed experts for training: one function with a gradient of its own over rows sorted by expert.

Plain operations would scatter gradients row by row, cast all weights and all their gradients in passes of their own
and sum the chosen experts through a batched product of one row. `Experts.forward_reference` in the model defines the
result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.gated import backward_rows, forward_rows

# A share of rows of a new size costs oneDNN a new kernel, compiled on the spot: filled up to multiples of 16, 24 experts
# of 256 ran at 350 GFLOP/s on two cores, in place of 280 forward and 240 for the weights' gradient.
PAD = 16


def experts(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor, load: Tensor) -> Tensor:
    """x [N, D], gate_up [E, 2f, D] (gate first), down [E, D, f], ids and weights [N, K], load [E] → [N, D], the sum over
    each token's experts; products in autocast's dtype where it is on."""
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = _Experts.apply(x, gate_up, down, ids, weights, load, dtype)
    return out


def fits(x: Tensor, gate_up: Tensor) -> bool:
    """Whether torch's grouped product takes these sizes: rows of 16 bytes, in float32 or bfloat16."""
    size = 2 if x.dtype == torch.bfloat16 or torch.is_autocast_enabled(x.device.type) else 4
    rows = (x.shape[-1], gate_up.shape[1] // 2, x.shape[0])
    return (
        x.shape[0] > 0
        and x.dtype in (torch.float32, torch.bfloat16)
        and all(n * size % 16 == 0 for n in rows)
    )


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        gate_up: Tensor,
        down: Tensor,
        ids: Tensor,
        weights: Tensor,
        load: Tensor,
        dtype: torch.dtype,
    ) -> Tensor:
        pad = PAD if dtype == torch.bfloat16 else 1
        order, place, ends = _lay_out(ids, load, pad)
        token = order // ids.shape[1]
        wide, narrow = gate_up.to(dtype), down.to(dtype)
        rows = _filled(x.to(dtype), pad).index_select(0, token)
        hidden = torch._grouped_mm(rows, wide.mT, offs=ends)
        y = torch._grouped_mm(forward_rows(*hidden.chunk(2, -1)), narrow.mT, offs=ends)
        ctx.save_for_backward(rows, hidden, wide, narrow, weights, order, token, place, ends)
        ctx.pad, ctx.dtypes = pad, (x.dtype, gate_up.dtype, down.dtype)
        return _sum_chosen(y, place, weights).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, wide, narrow, weights, order, token, place, ends = ctx.saved_tensors
        # each row's part of the output's gradient, before its weight: what is left of the weight then costs no product
        spread = _filled(grad.to(hidden.dtype), ctx.pad).index_select(0, token)
        by = _filled(weights, ctx.pad).flatten().index_select(0, order)
        dacted = torch._grouped_mm(spread, narrow, offs=ends)
        dhidden, scaled, dots = backward_rows(hidden, dacted, by)
        ddown = torch._grouped_mm(spread.mT, scaled, offs=ends)
        dweights = dots.index_select(0, place.flatten()).view_as(weights)
        drows = torch._grouped_mm(dhidden, wide, offs=ends)
        dgate_up = torch._grouped_mm(dhidden.mT, rows, offs=ends)
        dx = _sum_chosen(drows, place, None)
        of_x, of_wide, of_narrow = ctx.dtypes
        return (
            dx.to(of_x),
            dgate_up.to(of_wide),
            ddown.to(of_narrow),
            None,
            dweights.to(weights.dtype),
            None,
            None,
        )


def _lay_out(ids: Tensor, load: Tensor, pad: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids [N, K], load [E] → for each row, sorted by expert, its place in ids.flatten() (N * K or more for the rows
    that fill an expert's share up to a multiple of `pad`); the row of each of ids [N, K]; the ends of the shares [E]."""
    flat = ids.flatten()
    order = flat.argsort(stable=True)
    if pad == 1:
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=ids.device))
        return order, place.view_as(ids), load.cumsum(0, dtype=torch.int32)
    shares = (load + (pad - 1)) // pad * pad
    ends = shares.cumsum(0)
    shift = (ends - shares) - (load.cumsum(0) - load)  # what filling has moved each expert's rows by
    to = torch.arange(len(order), device=ids.device) + shift.index_select(0, flat.index_select(0, order))
    place = torch.empty_like(order).scatter_(0, order, to)
    filled = order.new_full((int(ends[-1]),), len(order) + ids.shape[1] - 1).scatter_(0, to, order)
    return filled, place.view_as(ids), ends.to(torch.int32)


def _filled(x: Tensor, pad: int) -> Tensor:
    """x [N, D] and, where shares are filled, a row of zeros for the rows that fill them."""
    return x if pad == 1 else torch.cat((x, x.new_zeros(1, x.shape[1])))


def _sum_chosen(rows: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    """rows [N * K, D] by expert, place [N, K] of each token's rows among them → their (weighted) sum [N, D] float32."""
    total: Tensor | None = None
    for k in range(place.shape[1]):
        part = rows.index_select(0, place[:, k]).float()
        if weights is not None:
            part.mul_(weights[:, k, None])
        total = part if total is None else total.add_(part)
    assert total is not None
    return total
