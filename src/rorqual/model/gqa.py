"""Grouped-query attention (arXiv 2305.13245): the Llama and Qwen form, multi-head where the head counts are
equal."""

from __future__ import annotations

from torch import Tensor, nn

from rorqual.model.attend import Attend
from rorqual.model.config import ModelConfig
from rorqual.model.layers import RMSNorm
from rorqual.model.rope import rotate_half, softmax_scale


class GQA(nn.Module):
    """Weights and projections of one layer; the cache and the mask belong to the `Attend` context."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.num_heads, self.num_key_value_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = config.head_dim
        self.scale = softmax_scale(config)
        hidden, bias = config.hidden_size, config.qkv_bias or config.attention_bias
        self.q_proj = nn.Linear(hidden, self.num_heads * self.head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden, self.num_key_value_heads * self.head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden, self.num_key_value_heads * self.head_dim, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden, bias=config.attention_bias)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, value: Tensor | None = None
    ) -> Tensor:
        """x [*L, hidden] → [*L, hidden]. `value` [*L, Hkv * D], where given, is added to the values."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1))
        k = self.k_proj(x).unflatten(-1, (self.num_key_value_heads, -1))
        v = self.v_proj(x) if value is None else self.v_proj(x) + value
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate_half(q, cos, sin), rotate_half(k, cos, sin)
        out = attend.gqa(self.layer, self, q, k, v.unflatten(-1, (self.num_key_value_heads, -1)))
        result: Tensor = self.o_proj(out.flatten(-2))
        return result
