"""The paged cache's tensors: per layer one row a token, the latent and rotary key of MLA, or K and V."""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.model.config import ModelConfig


class PagedCache:
    """Rows by slot: slot = block * block_size + place. MLA: one tensor [slots, C + R] a layer;
    grouped-query attention: two [slots, Hkv, D]."""

    def __init__(self, config: ModelConfig, slots: int, dtype: torch.dtype, device: torch.device) -> None:
        self.slots = slots
        self.rank = config.kv_lora_rank or 0
        layers = config.num_hidden_layers
        self.experts: Tensor | None = None  # [slots, MoE layers, K] int16, where they are recorded
        if config.attention == "mla":
            width = (config.kv_lora_rank or 0) + config.qk_rope_head_dim
            self.latent = [torch.zeros(slots, width, dtype=dtype, device=device) for _ in range(layers)]
            self.keys: list[Tensor] = []
            self.values: list[Tensor] = []
        else:
            shape = (slots, config.num_key_value_heads, config.head_dim)
            self.latent = []
            self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]
            self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(layers)]

    @property
    def itemsize(self) -> int:
        """Bytes of one cached element."""
        return (self.latent or self.keys)[0].element_size()

    @property
    def bytes(self) -> int:
        """Allocated bytes: slots x cached elements a token x element size."""
        return sum(t.numel() * t.element_size() for t in (*self.latent, *self.keys, *self.values))
