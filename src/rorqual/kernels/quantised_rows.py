"""Rows of a packed matrix, widened: an embedding's look-up.

ids [*L] int64 below packed.rows, packed [rows, width] → [*L, width] float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.native import native
from rorqual.kernels.quantised import KINDS, Packed, dequantise


def quantised_rows_reference(ids: Tensor, packed: Packed) -> Tensor:
    """The definition; only blocks of 16 rows that are looked up are widened."""
    blocks, where = (ids.flatten() // 16).unique(return_inverse=True)
    wide = dequantise(Packed(packed.data[blocks], 16 * len(blocks), packed.width, packed.format))
    return wide[where * 16 + ids.flatten() % 16].view(*ids.shape, packed.width)


def quantised_rows(ids: Tensor, packed: Packed) -> Tensor:
    """Natively where the library is there and the ids are on the CPU. Raises IndexError for an id that is no row."""
    library = native()
    if library is None or not ids.is_cpu:
        return quantised_rows_reference(ids, packed)
    ids = ids.long().contiguous()
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < packed.rows:
        raise IndexError(f"ids from {int(ids.min())} to {int(ids.max())}: the matrix has {packed.rows} rows")
    f = packed.format
    out = torch.empty(*ids.shape, packed.width)
    library.rows(
        packed.data.data_ptr(), packed.rows, packed.width, KINDS.index(f.kind), f.group,
        ids.data_ptr(), ids.numel(), out.data_ptr(),
    )  # fmt: skip
    return out
