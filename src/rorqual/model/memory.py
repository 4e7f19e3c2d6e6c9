"""Tables that a token reads instead of computing: parameters without matrix products.

They help small models much and large ones little (nanochat's log found the pair table's gain gone at depth
25); `rorqual cost` shows their size apart from the FLOPs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.model.config import ModelConfig

# Two odd multipliers far apart in bits: a pair's hash must depend on both tokens and on their order.
_FIRST, _SECOND = 0x9E3779B1, 0x85EBCA77


class NgramTable(nn.Module):
    """A table of hashed (previous token, token) pairs; each layer adds its row with a learned weight."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.rows = config.ngram_table_size
        self.weight = nn.Parameter(torch.empty(self.rows, config.hidden_size))
        self.scale = nn.Parameter(torch.empty(config.num_hidden_layers))

    def forward(self, ids: Tensor, previous: Tensor) -> Tensor:
        """ids, previous [*L] → rows [*L, D]."""
        return nn.functional.embedding(self.index(ids, previous), self.weight)

    def index(self, ids: Tensor, previous: Tensor) -> Tensor:
        """The row of each pair [*L]."""
        mixed = (previous.long() * _FIRST) ^ (ids.long() * _SECOND)
        return (mixed ^ (mixed >> 15)) % self.rows


class ValueEmbedding(nn.Module):
    """A row of the token's own, added to the attention's values through a gate read from the hidden state."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        mla = config.kv_lora_rank is not None
        width = config.kv_lora_rank if mla else config.num_key_value_heads * config.head_dim
        assert width is not None
        self.weight = nn.Parameter(torch.empty(config.vocab_size, width))
        self.gate = nn.Linear(config.hidden_size, 1, bias=True)

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        """ids [*L], x [*L, D] → [*L, width]; the gate opens between 0 and 2, 1 at the start."""
        return 2 * torch.sigmoid(self.gate(x)) * nn.functional.embedding(ids, self.weight).to(x.dtype)


def has_value_embedding(config: ModelConfig, layer: int) -> bool:
    """Every other layer, the last one always among them."""
    return config.value_embeddings and (config.num_hidden_layers - 1 - layer) % 2 == 0
