"""x times a matrix as it is, float32 or bfloat16, for a few rows: torch reads bfloat16 weights at a tenth of the
memory's speed there (bench/kernels.py).

x [N, width], weight [rows, width] → [N, rows] float32.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.native import can_take, native, type_of

MOST_ROWS = 8  # beyond, torch's blocked product is faster (bench/kernels.py)


def dense_linear_reference(x: Tensor, weight: Tensor) -> Tensor:
    """The definition."""
    return F.linear(x.float(), weight.float())


def dense_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Natively for up to MOST_ROWS rows on the CPU, else torch's product in the weight's dtype."""
    n, width = x.shape
    library = native()
    if library is None or n > MOST_ROWS or not can_take(x, weight) or not weight.is_contiguous():
        return F.linear(x.to(weight.dtype), weight).float()
    x = x.contiguous()
    out = torch.empty(n, len(weight))
    library.dense(
        weight.data_ptr(), type_of(weight), x.data_ptr(), type_of(x), width, n, len(weight), width, 1, 0,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return out
