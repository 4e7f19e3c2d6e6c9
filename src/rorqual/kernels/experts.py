"""Routed experts for training: one function with a gradient of its own over rows sorted by expert.

Plain operations would scatter gradients row by row, cast all weights and all their gradients in passes of their own
and sum the chosen experts through a batched product of one row. `Experts.forward_reference` in the model defines the
result.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
        order = ids.flatten().argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        ends = load.cumsum(0, dtype=torch.int32)
        wide, narrow = gate_up.to(dtype), down.to(dtype)
        rows = x.to(dtype).index_select(0, order // ids.shape[1])
        hidden = torch._grouped_mm(rows, wide.mT, offs=ends)
        gate, up = hidden.chunk(2, -1)
        acted = F.silu(gate) * up
        y = torch._grouped_mm(acted, narrow.mT, offs=ends)
        ctx.save_for_backward(rows, hidden, acted, y, wide, narrow, weights, order, place, ends)
        ctx.dtypes = x.dtype, gate_up.dtype, down.dtype
        return _sum_chosen(y, place.view_as(ids), weights).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, hidden, acted, y, wide, narrow, weights, order, place, ends = ctx.saved_tensors
        k = weights.shape[1]
        spread = grad.to(y.dtype).index_select(0, order // k)  # each row's part of the output's gradient
        dweights = (spread.float() * y.float()).sum(-1).index_select(0, place).view_as(weights)
        dy = spread * weights.flatten().index_select(0, order)[:, None].to(y.dtype)
        dacted = torch._grouped_mm(dy, narrow, offs=ends)
        ddown = torch._grouped_mm(dy.mT, acted, offs=ends)
        gate, up = hidden.chunk(2, -1)
        dgate = torch.ops.aten.silu_backward(dacted * up, gate)
        dhidden = torch.cat((dgate, dacted.mul_(F.silu(gate))), -1)
        drows = torch._grouped_mm(dhidden, wide, offs=ends)
        dgate_up = torch._grouped_mm(dhidden.mT, rows, offs=ends)
        dx = _sum_chosen(drows, place.view_as(weights), None)
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
