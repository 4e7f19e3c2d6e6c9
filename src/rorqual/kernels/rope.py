"""Rotary embedding in one call: as torch operations its dispatch takes ten times as long as its work where a token is
decoded; in training pairs that lie apart take six times as long, neighbours a third longer.

x [N, H, R] or [B, T, H, R], cos and sin [N, R/2], [B, T, R/2] or [T, R/2] float32 → x's shape and dtype.
`interleaved`: the pairs (0, 1), (2, 3), …; else (i, i + R/2). The definitions are model/rope.py's.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.native import TYPES, can_take, native


def fits(x: Tensor, cos: Tensor) -> bool:
    """Whether the native kernel takes these."""
    return (
        native() is not None
        and can_take(x)
        and cos.is_contiguous()
        and cos.dtype == torch.float32
        and x.stride(-1) == 1
        and (x.dim() == 3 or (x.dim() == 4 and x.stride(0) == x.shape[1] * x.stride(1)))
        and cos.shape[:-1] in (x.shape[:-2], x.shape[1:-2])
    )


def rope(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Natively, where it `fits`."""
    library = native()
    assert library is not None
    heads, width = x.shape[-2:]
    out = torch.empty(x.shape, dtype=x.dtype)
    library.rope(
        x.data_ptr(), TYPES[x.dtype], x.stride(-3), x.stride(-2), cos.data_ptr(), sin.data_ptr(),
        cos.numel() * 2 // width, out.numel() // (heads * width), heads, width, int(interleaved), out.data_ptr(),
        torch.get_num_threads(),
    )  # fmt: skip
    return out
