"""The paged cache's tensors: per layer one row a token, the latent and rotary key of MLA, or K and V."""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.kernels.paged import restore_rows, round_rows, row_bytes
from rorqual.model.config import ModelConfig


class PagedCache:
    """Rows by slot: slot = block * block_size + place. MLA: one tensor [slots, C + R] a layer;
    grouped-query attention: two [slots, Hkv, D]. Kept at 8 bits (dtype uint8) a row is `paged.round_rows` of it."""

    def __init__(
        self, config: ModelConfig, slots: int, dtype: torch.dtype, device: torch.device, mtp: bool = False
    ) -> None:
        """`mtp`: one layer more, of the first multi-token prediction module."""
        self.slots, self.dtype, self.device = slots, dtype, device
        self.rank = config.kv_lora_rank or 0
        layers = config.num_hidden_layers + mtp
        self.experts: Tensor | None = None  # [slots, MoE layers, K] int16, where they are recorded
        if config.attention == "mla":
            width = _stored((config.kv_lora_rank or 0) + config.qk_rope_head_dim, dtype)
            self.latent = [torch.zeros(slots, width, dtype=dtype, device=device) for _ in range(layers)]
            self.keys: list[Tensor] = []
            self.values: list[Tensor] = []
        else:
            shape = (slots, config.num_key_value_heads, _stored(config.head_dim, dtype))
            self.latent = []
            self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
            self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """Every tensor whose first dimension is the slot."""
        return (*self.latent, *self.keys, *self.values)

    @property
    def bytes(self) -> int:
        """Allocated bytes."""
        return sum(t.numel() * t.element_size() for t in self.rows)

    def write(self, rows: Tensor, slots: Tensor, x: Tensor) -> None:
        """Put x [N, …, width] into one of the cache's tensors."""
        rows[slots] = round_rows(x) if self.dtype == torch.uint8 else x.to(rows.dtype)

    def read(self, rows: Tensor, slots: Tensor, like: Tensor) -> Tensor:
        """Rows of one of the cache's tensors at slots [*S] → [*S, …, width of `like`], in `like`'s dtype."""
        found = rows[slots]
        return (restore_rows(found, like.shape[-1]) if self.dtype == torch.uint8 else found).to(like.dtype)


def token_bytes(config: ModelConfig, dtype: torch.dtype, mtp: bool = False) -> int:
    """Cache bytes of one token."""
    if config.attention == "mla":
        row = _stored((config.kv_lora_rank or 0) + config.qk_rope_head_dim, dtype)
    else:
        row = 2 * config.num_key_value_heads * _stored(config.head_dim, dtype)
    return (config.num_hidden_layers + mtp) * row * dtype.itemsize


def _stored(width: int, dtype: torch.dtype) -> int:
    """Elements that a row of this width takes."""
    return row_bytes(width) if dtype == torch.uint8 else width
