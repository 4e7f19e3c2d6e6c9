"""Tables that a token reads instead of computing: parameters without matrix products.

They help small models much and large ones little (nanochat's log found the pair table's gain gone at depth
25); `rorqual cost` shows their size apart from the FLOPs.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.model.config import ModelConfig

# Odd multipliers far apart in bits: a hash must depend on every token and on their order.
_MULTIPLIERS = (0x85EBCA77, 0x9E3779B1, 0xC2B2AE3D)


class NgramTable(nn.Module):
    """A table of the hashed last tokens, two or three; each layer adds its row with a learned weight."""

    def __init__(self, config: ModelConfig, rows: int) -> None:
        super().__init__()
        self.rows = rows
        # A batch reads few of the rows: its gradient holds those alone. Off where processes add up gradients.
        self.sparse = True
        self.weight = nn.Parameter(torch.empty(self.rows, config.hidden_size))
        self.scale = nn.Parameter(torch.empty(config.num_hidden_layers))

    def forward(self, *tokens: Tensor) -> Tensor:
        """The tokens [*L], those before them, and so on → rows [*L, D]."""
        return nn.functional.embedding(self.index(*tokens), self.weight, sparse=self.sparse)

    def index(self, *tokens: Tensor) -> Tensor:
        """The row of each pair or triple [*L]."""
        mixed = tokens[0].long() * _MULTIPLIERS[0]
        for t, multiplier in zip(tokens[1:], _MULTIPLIERS[1:], strict=False):
            mixed = mixed ^ (t.long() * multiplier)
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
