"""Softmax over a vocabulary for a loss: sums and weighted probabilities, row by row in the cache."""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.native import TYPES, can_take, native


def softmax_rows_reference(logits: Tensor, by: Tensor, out: Tensor | None) -> Tensor:
    """logits [N, V] → each row's logarithm of the sum of exponentials [N], float32. `out` [N, V], where given, becomes
    the probabilities times `by` [N]."""
    wide = logits.float()
    sums = wide.logsumexp(-1)
    if out is not None:
        out.copy_((wide - sums[:, None]).exp_().mul_(by[:, None]))
    return sums


def softmax_rows(logits: Tensor, by: Tensor, out: Tensor | None) -> Tensor:
    """The same, natively where it can be."""
    library = None if torch.compiler.is_compiling() else native()
    fits = can_take(logits) and logits.is_contiguous() and by.is_contiguous() and by.dtype == torch.float32
    if out is not None:
        fits = fits and out.dtype == logits.dtype and out.is_contiguous()
    if library is None or not fits:
        return softmax_rows_reference(logits, by, out)
    sums = torch.empty(len(logits), dtype=torch.float32)
    library.softmax(
        logits.data_ptr(), TYPES[logits.dtype], by.data_ptr(), *logits.shape, None if out is None else out.data_ptr(),
        sums.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
    return sums
