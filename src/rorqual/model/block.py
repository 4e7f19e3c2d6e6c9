"""One layer: attention and feed-forward, each behind an RMSNorm and a residual."""

from __future__ import annotations

from torch import Tensor, nn

from rorqual.model.attend import Attend
from rorqual.model.config import ModelConfig
from rorqual.model.gqa import GQA
from rorqual.model.layers import RMSNorm, SwiGLU
from rorqual.model.mla import MLA
from rorqual.model.moe import MoE, Routing


class Block(nn.Module):
    """A layer of either family; `layer` is its index, by which caches and routing records know it."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn: MLA | GQA = MLA(config, layer) if config.attention == "mla" else GQA(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp: MoE | SwiGLU = (
            MoE(config, layer)
            if config.is_moe(layer)
            else SwiGLU(config.hidden_size, config.intermediate_size, config.mlp_bias)
        )

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Attend,
        routing: Routing | None = None,
        value: Tensor | None = None,
    ) -> Tensor:
        """x [*L, D] → [*L, D]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, attend, value)
        normed = self.post_attention_layernorm(x)
        return x + (self.mlp(normed, routing) if isinstance(self.mlp, MoE) else self.mlp(normed))
