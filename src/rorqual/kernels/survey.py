"""What sampling asks of every row of logits, in one pass: the largest value's place, and whether all are finite.

x [M, V] float32 → (places of the first largest values, or anything where a row is not finite; finite or not).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.native import native


def survey_reference(x: Tensor) -> tuple[list[int], list[bool]]:
    """The definition."""
    return x.argmax(-1).tolist(), x.isfinite().all(-1).tolist()


def survey(x: Tensor) -> tuple[list[int], list[bool]]:
    """Natively where the library is there and x is on the CPU in float32."""
    library = native()
    if library is None or not x.is_cpu or x.dtype != torch.float32 or not x.is_contiguous():
        return survey_reference(x)
    rows, width = x.shape
    best, finite = torch.empty(rows, dtype=torch.int64), torch.empty(rows, dtype=torch.bool)
    library.survey(x.data_ptr(), rows, width, best.data_ptr(), finite.data_ptr())
    return best.tolist(), finite.tolist()
