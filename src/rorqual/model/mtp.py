"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): one more layer that guesses one token
further."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.model.attend import Attend
from rorqual.model.block import Block
from rorqual.model.config import ModelConfig
from rorqual.model.layers import RMSNorm
from rorqual.model.moe import Routing


class MTP(nn.Module):
    """h' = layer(eh_proj([norm(embedding of the next token), norm(h)])); embedding and head are the model's
    own.

    The paper writes the hidden state first; the released weights want the embedding first.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.block = Block(config, layer)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        h: Tensor,
        embedding: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Attend,
        routing: Routing | None = None,
    ) -> Tensor:
        """h [*L, D] of positions i, embedding [*L, D] of the tokens at i + 1 → normed hidden states [*L, D]
        whose logits predict the tokens at i + 2."""
        x = self.eh_proj(torch.cat((self.enorm(embedding), self.hnorm(h)), -1))
        out: Tensor = self.norm(self.block(x, cos, sin, attend, routing))
        return out
