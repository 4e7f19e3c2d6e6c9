"""Each head's input times that head's own packed matrix: what absorbs kv_b_proj into queries and outputs.

x [*L, H, width], packed [H, rows, width] → [*L, H, rows] float32, rounded as in quantised_linear.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.native import can_take, native, type_of
from rorqual.kernels.quantised import KINDS, Packed, dequantise, round_activations


def quantised_heads_reference(x: Tensor, packed: Packed) -> Tensor:
    """The definition."""
    return torch.einsum("...hi,hoi->...ho", round_activations(x, packed.format.group), dequantise(packed))


def quantised_heads(x: Tensor, packed: Packed) -> Tensor:
    """Natively where the library is there and x is on the CPU."""
    library = native()
    if library is None or not can_take(x):
        return quantised_heads_reference(x, packed)
    x = x.contiguous()
    heads, width = x.shape[-2:]
    n, f = x.numel() // (heads * width), packed.format
    out = torch.empty(*x.shape[:-1], packed.rows)
    library.linear(
        packed.data.data_ptr(), packed.rows, packed.width, KINDS.index(f.kind), f.group,
        x.data_ptr(), type_of(x), heads * width, n, heads, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out
