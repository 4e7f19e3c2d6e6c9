"""Rotary embedding in one call, for decoding: as torch operations its dispatch takes ten times as long as its work.

x [N, H, R] (any strides but of the last dimension), cos and sin [N, R/2] float32 → [N, H, R] in x's dtype.
`interleaved`: the pairs (0, 1), (2, 3), …; else (i, i + R/2). The definitions are model/rope.py's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.native import TYPES, can_take, native


def fits(x: Tensor, cos: Tensor) -> bool:
    """Whether the native kernel takes these, and no gradient is wanted."""
    plain = x.dim() == 3 and x.stride(-1) == 1 and can_take(x) and cos.is_contiguous()
    return plain and native() is not None and not torch.is_grad_enabled()


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Natively, where it `fits`."""
    library = native()
    assert library is not None
    n, heads, width = x.shape
    out = torch.empty(n, heads, width, dtype=x.dtype)
    library.rope(
        x.data_ptr(), TYPES[x.dtype], x.stride(0), x.stride(1), cos.data_ptr(), sin.data_ptr(),
        n, heads, width, int(interleaved), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out
