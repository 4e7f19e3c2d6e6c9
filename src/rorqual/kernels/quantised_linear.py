"""x times a packed matrix: the product of every quantised linear layer.

x [*L, width], packed [rows, width] → [*L, rows] float32. Activations are rounded to 8 bits in the matrix's groups
(an error of about half a percent of the output), so that products of whole numbers do the work. A row's result does
not depend on the rows beside it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.native import can_take, native, type_of
from rorqual.kernels.quantised import KINDS, Packed, dequantise, round_activations


def quantised_linear_reference(x: Tensor, packed: Packed) -> Tensor:
    """The definition."""
    return F.linear(round_activations(x, packed.format.group), dequantise(packed))


def quantised_linear(x: Tensor, packed: Packed) -> Tensor:
    """Natively where the library is there and x is on the CPU."""
    library = native()
    if library is None or not can_take(x):
        return quantised_linear_reference(x, packed)
    x = x.contiguous()
    n, f = x.numel() // packed.width, packed.format
    out = torch.empty(*x.shape[:-1], packed.rows)
    library.linear(
        packed.data.data_ptr(), packed.rows, packed.width, KINDS.index(f.kind), f.group,
        x.data_ptr(), type_of(x), packed.width, n, 1, out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out
