"""SwiGLU's elementwise part for training: silu(gate) * up with its gradients, each in one pass over memory.

Natively on the CPU where the library is there; else as torch operations, which define it.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.native import TYPES, can_take, native


def gated_reference(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [*L, f] → silu(gate) * up [*L, f]."""
    return F.silu(gate) * up


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """The same, in one pass where it can be."""
    if gate.dim() < 2 or not _fits(gate, up) or not (gate.is_contiguous() and up.is_contiguous()):
        return gated_reference(gate, up)
    if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
        out: Tensor = _Gated.apply(gate, up)
        return out
    return forward_rows(gate, up)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return forward_rows(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        dgate, dup = torch.empty_like(gate), torch.empty_like(up)
        _back(gate, up, grad.to(gate.dtype).contiguous(), None, dgate, dup, None, None)
        return dgate, dup


def forward_rows(gate: Tensor, up: Tensor) -> Tensor:
    """gate, up [*L, f] of one row stride → [*L, f], without a gradient."""
    library = native()
    if library is None or not _fits(gate, up):
        return gated_reference(gate, up)
    width = gate.shape[-1]
    out = torch.empty(gate.shape, dtype=gate.dtype)
    library.gated(
        gate.data_ptr(), up.data_ptr(), TYPES[gate.dtype], gate.stride(-2), gate.numel() // width, width,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def backward_rows(hidden: Tensor, grad: Tensor, by: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of rows of an expert: hidden [N, 2f] (gate first), the gradient [N, f] of its activation before it is weighted by
    `by` [N] float32 → the gradient of hidden [N, 2f], the activation times `by` [N, f], each row's sum of grad *
    activation [N] float32: the weight's own gradient."""
    gate, up = hidden.chunk(2, -1)
    if native() is None or not _fits(gate, up):
        return backward_rows_reference(hidden, grad, by)
    dhidden, scaled = torch.empty_like(hidden), torch.empty_like(grad)
    dots = torch.empty(len(grad), dtype=torch.float32)
    dgate, dup = dhidden.chunk(2, -1)
    _back(gate, up, grad.contiguous(), by.float().contiguous(), dgate, dup, scaled, dots)
    return dhidden, scaled, dots


def backward_rows_reference(hidden: Tensor, grad: Tensor, by: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of `backward_rows`."""
    gate, up = hidden.chunk(2, -1)
    silu = F.silu(gate)
    scale = by[:, None].to(grad.dtype)
    dots = (grad.float() * (silu * up).float()).sum(-1)
    dgate = torch.ops.aten.silu_backward(grad * scale * up, gate)
    return torch.cat((dgate, grad * scale * silu), -1), silu * up * scale, dots


def _fits(gate: Tensor, up: Tensor) -> bool:
    return (
        not torch.compiler.is_compiling()
        and native() is not None
        and can_take(gate, up)
        and gate.dtype == up.dtype
        and gate.shape == up.shape
        and gate.shape[-1] % 16 == 0
        and gate.stride(-1) == up.stride(-1) == 1
        and gate.stride(-2) == up.stride(-2)
    )


def _back(
    gate: Tensor,
    up: Tensor,
    grad: Tensor,
    by: Tensor | None,
    dgate: Tensor,
    dup: Tensor,
    scaled: Tensor | None,
    dots: Tensor | None,
) -> None:
    library = native()
    assert library is not None
    width = gate.shape[-1]
    library.gated_back(
        gate.data_ptr(), up.data_ptr(), TYPES[gate.dtype], gate.stride(-2), grad.data_ptr(), _address(by),
        gate.numel() // width, width, dgate.data_ptr(), dup.data_ptr(), dgate.stride(-2), _address(scaled),
        _address(dots), torch.get_num_threads(),
    )  # fmt: skip


def _address(x: Tensor | None) -> int | None:
    return None if x is None else x.data_ptr()
