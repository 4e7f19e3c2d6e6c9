"""Multi-head Latent Attention (DeepSeek-V2, arXiv 2405.04434, section 2.1).

A token leaves only its normalised latent c_kv [C] and one rotated key k_rope [R], shared by all heads, in the
cache. `Attend` contexts compute the attention in either form: expanded, with keys and values of each head, or
absorbed, where kv_b_proj's key half moves into the query and its value half behind the softmax.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from rorqual.model.attend import Attend
from rorqual.model.config import ModelConfig
from rorqual.model.layers import RMSNorm
from rorqual.model.rope import rotate_half, rotate_interleaved, softmax_scale

LATENT_NORM_EPS = 1e-6  # the published code gives these two norms their default, whatever rms_norm_eps says


class Absorbed(Protocol):
    """Both absorbed products over weights that are not `kv_b_proj.weight`, such as quantised ones."""

    def query(self, q_nope: Tensor) -> Tensor: ...

    def output(self, latent: Tensor) -> Tensor: ...


class MLA(nn.Module):
    """Weights and projections of one layer; the cache and the mask belong to the `Attend` context."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.kv_lora_rank is not None
        self.layer = layer
        self.num_heads = config.num_attention_heads
        self.kv_lora_rank = config.kv_lora_rank
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.scale = softmax_scale(config)
        self.rotate = rotate_interleaved if config.rope_interleave else rotate_half
        hidden, bias = config.hidden_size, config.attention_bias
        q_width = self.num_heads * config.qk_head_dim
        if config.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, q_width, bias=False)
        else:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = nn.Linear(config.q_lora_rank, q_width, bias=False)
        self.q_lora_rank = config.q_lora_rank
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.kv_lora_rank + self.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = nn.Linear(
            self.kv_lora_rank, self.num_heads * (self.qk_nope_head_dim + self.v_head_dim), bias=False
        )
        self.absorbed: Absorbed | None = None
        self.o_proj = nn.Linear(self.num_heads * self.v_head_dim, hidden, bias=bias)
        # The latent's norm already bounds the keys; only the query and the shared rotary key need one of
        # their own.
        self.q_norm = RMSNorm(config.qk_head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(self.qk_rope_head_dim, config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend, value: Tensor | None = None
    ) -> Tensor:
        """x [*L, hidden] → [*L, hidden]. `value` [*L, C], where given, is added to the latent (value
        embeddings)."""
        q_nope, q_rope = self.query(x, cos, sin)
        c_kv, k_rope = self.latent(x, cos, sin)
        if value is not None:
            c_kv = c_kv + value
        out = attend.mla(self.layer, self, q_nope, q_rope, c_kv, k_rope)
        result: Tensor = self.o_proj(out.flatten(-2))
        return result

    def query(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x [*L, hidden] → q_nope [*L, H, n] and the rotated q_rope [*L, H, R]."""
        q = (
            self.q_proj(x)
            if self.q_lora_rank is None
            else self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        )
        q = q.unflatten(-1, (self.num_heads, -1))
        if self.q_norm is not None:
            q = self.q_norm(q)
        q_nope, q_rope = q.split([self.qk_nope_head_dim, self.qk_rope_head_dim], -1)
        return q_nope, self.rotate(q_rope, cos, sin)

    def latent(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """x [*L, hidden] → what the cache keeps: c_kv [*L, C] normalised, k_rope [*L, R] rotated."""
        c_kv, k_rope = self.kv_a_proj_with_mqa(x).split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        if self.k_norm is not None:
            k_rope = self.k_norm(k_rope)
        return self.kv_a_layernorm(c_kv), self.rotate(k_rope.unsqueeze(-2), cos, sin).squeeze(-2)

    def expand(self, c_kv: Tensor) -> tuple[Tensor, Tensor]:
        """c_kv [*L, C] → keys without position [*L, H, n] and values [*L, H, v]."""
        kv = self.kv_b_proj(c_kv).unflatten(-1, (self.num_heads, -1))
        k_nope, v = kv.split([self.qk_nope_head_dim, self.v_head_dim], -1)
        return k_nope, v

    def kv_b_weight(self) -> Tensor:
        """kv_b_proj as [H, n + v, C]: rows of each head's keys, then of its values."""
        return self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1))

    def absorb_query(self, q_nope: Tensor) -> Tensor:
        """q_nope [*L, H, n] → the query in latent space [*L, H, C]."""
        if self.absorbed is not None:
            return self.absorbed.query(q_nope)
        return torch.einsum("...hn,hnc->...hc", q_nope, self.kv_b_weight()[:, : self.qk_nope_head_dim])

    def expand_output(self, latent: Tensor) -> Tensor:
        """The attention's output in latent space [*L, H, C] → values [*L, H, v]."""
        if self.absorbed is not None:
            return self.absorbed.output(latent)
        return torch.einsum("...hc,hvc->...hv", latent, self.kv_b_weight()[:, self.qk_nope_head_dim :])
