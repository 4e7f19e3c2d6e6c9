"""RMSNorm: in one native call where no gradient is wanted, and for training on a CPU in few passes, under autocast
with an output in its dtype.

Plain operations would leave float32, which autocast then casts once for each projection that reads it; its gradients
take the same way back. `rms_norm_reference` defines the result.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rorqual.kernels.native import TYPES, can_take, native


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension [*L, D], the mean square taken in float32."""
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return weight * normed.to(x.dtype)


def rms_norm_native(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same without a gradient, natively where the library is there, else by the definition."""
    library = native()
    if library is None or x.dtype != weight.dtype or not can_take(x, weight):
        return rms_norm_reference(x, weight, eps)
    x = x.contiguous()
    width = x.shape[-1]
    out = torch.empty_like(x)
    library.rms_norm(
        x.data_ptr(), TYPES[x.dtype], weight.data_ptr(), x.numel() // width, width, eps,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The same with a gradient of its own."""
    dtype = x.dtype
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
    with torch.autocast(x.device.type, enabled=False):
        out: Tensor = _RMSNorm.apply(x, weight, eps, dtype)
    return out


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.float()
        size = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
        inverse = (size.square_() / x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (wide * inverse).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x, weight, inverse = ctx.saved_tensors
        width = x.shape[-1]
        rows, grads = x.float().reshape(-1, width), grad.float().reshape(-1, width)
        inverse = inverse.view(-1, 1)
        both = grads * rows
        dweight = (inverse.mT @ both)[0]
        # d/dx of x / rms(x): what is along x drops out
        along = (both @ weight.float()[:, None]) * inverse.pow(3).div_(-width)
        dx = (grads * weight).mul_(inverse).addcmul_(rows, along)
        return dx.view_as(x).to(x.dtype), dweight.to(weight.dtype), None, None
