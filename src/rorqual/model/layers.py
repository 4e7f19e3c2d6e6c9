"""The parts every layer shares: RMSNorm and the SwiGLU feed-forward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from rorqual.kernels.gated import gated
from rorqual.kernels.norm import rms_norm, rms_norm_native

M = TypeVar("M", bound=nn.Module)


def apply_keeping_float32(
    module: M, apply: Callable[..., Any], fn: Callable[[Tensor], Tensor], name: str
) -> M:
    """`nn.Module._apply` for a module whose buffer `name` follows to other devices but never leaves
    float32."""
    kept = module._buffers.get(name)
    apply(fn)
    moved = module._buffers.get(name)
    if kept is not None and moved is not None and moved.dtype != torch.float32:
        module._buffers[name] = kept.to(moved.device)
    return module


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, the mean square taken in float32 (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_grad_enabled():
            return rms_norm(x, self.weight, self.eps)
        return rms_norm_native(x, self.weight, self.eps)

    def extra_repr(self) -> str:
        return f"{tuple(self.weight.shape)}, eps={self.eps}"


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(gated(self.gate_proj(x), self.up_proj(x)))
        return out
