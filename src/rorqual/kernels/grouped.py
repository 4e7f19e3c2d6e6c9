"""One matrix product per expert over rows sorted by expert.

x [M, in] holds the rows of expert 0, then of expert 1, …; ends [E] counts the rows up to each expert's last
(int32, cumulative); weight [E, out, in]. → [M, out].
"""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.triton import has_triton


def grouped_linear_reference(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """The definition: a loop over experts."""
    pieces, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        pieces.append(x[start:end] @ weight[expert].T)
        start = end
    return torch.cat(pieces)


def grouped_linear(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """torch._grouped_mm where its strides allow it (rows of 16 bytes), else the loop; in Triton on CUDA, without
    gradients.

    Under autocast the operands are cast here, as autocast does not know the op.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(dtype), weight.to(dtype)
    if x.is_cuda and x.dtype == weight.dtype and not torch.is_grad_enabled() and has_triton():
        from rorqual.kernels.triton_grouped import grouped_linear_triton

        return grouped_linear_triton(x, weight, ends)
    if x.shape[0] and _aligned(x) and _aligned(weight) and weight.shape[1] * weight.element_size() % 16 == 0:
        with torch.autocast(x.device.type, enabled=False):
            out: Tensor = torch._grouped_mm(x, weight.mT, offs=ends)
            return out
    return grouped_linear_reference(x, weight, ends)


def _aligned(x: Tensor) -> bool:
    return (
        x.dtype in (torch.float32, torch.bfloat16)
        and x.is_contiguous()
        and x.shape[-1] * x.element_size() % 16 == 0
    )
