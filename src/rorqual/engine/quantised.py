"""Modules over packed weights, which take the places of a model's own.

Each holds its packed matrices as uint8 buffers and returns its input's dtype; kernels/quantised.py has the layout.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rorqual.kernels.quantised import Format, Packed, quantise
from rorqual.kernels.quantised_experts import pack_up, quantised_experts
from rorqual.kernels.quantised_heads import quantised_heads
from rorqual.kernels.quantised_linear import quantised_linear
from rorqual.kernels.quantised_rows import quantised_rows
from rorqual.model.layers import SwiGLU
from rorqual.model.mla import MLA
from rorqual.model.moe import Experts


def empty(format: Format, rows: int, width: int, *stack: int) -> Tensor:
    """Room for packed matrices."""
    return torch.empty(*stack, *format.shape(rows, width), dtype=torch.uint8)


class QuantLinear(nn.Module):
    """A linear layer; its bias stays wide."""

    packed: Tensor
    bias: Tensor | None

    def __init__(self, format: Format, out_features: int, in_features: int, bias: bool = False) -> None:
        super().__init__()
        self.format, self.out_features, self.in_features = format, out_features, in_features
        self.register_buffer("packed", empty(format, out_features, in_features))
        self.register_buffer("bias", torch.empty(out_features) if bias else None)

    @classmethod
    def of(cls, linear: nn.Linear, format: Format, importance: Tensor | None = None) -> QuantLinear:
        new = cls(format, linear.out_features, linear.in_features, linear.bias is not None)
        new.packed = quantise(linear.weight.detach(), format, importance).data
        new.bias = None if linear.bias is None else linear.bias.detach().float()
        return new

    @property
    def matrix(self) -> Packed:
        return Packed(self.packed, self.out_features, self.in_features, self.format)

    def forward(self, x: Tensor) -> Tensor:
        """x [*L, in] → [*L, out]."""
        y = quantised_linear(x, self.matrix)
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.format.kind} in groups of {self.format.group}"


class QuantEmbedding(nn.Module):
    """An embedding whose rows are widened when they are looked up."""

    packed: Tensor

    def __init__(self, format: Format, rows: int, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.format, self.rows, self.width, self.dtype = format, rows, width, dtype
        self.register_buffer("packed", empty(format, rows, width))

    @classmethod
    def of(cls, embedding: nn.Embedding, format: Format) -> QuantEmbedding:
        weight = embedding.weight.detach()
        new = cls(format, weight.shape[0], weight.shape[1], weight.dtype)
        new.packed = quantise(weight, format).data
        return new

    def forward(self, ids: Tensor) -> Tensor:
        """ids [*L] → [*L, width]."""
        return quantised_rows(ids, Packed(self.packed, self.rows, self.width, self.format)).to(self.dtype)


class QuantExperts(nn.Module):
    """All routed experts of a layer."""

    up: Tensor
    down: Tensor

    def __init__(self, format: Format, experts: int, hidden: int, inner: int) -> None:
        super().__init__()
        self.format, self.hidden, self.inner = format, hidden, inner
        self.register_buffer("up", torch.cat([empty(format, inner, hidden, experts) for _ in range(2)], 1))
        self.register_buffer("down", empty(format, hidden, inner, experts))

    @classmethod
    def of(cls, experts: Experts, format: Format, importance: Tensor | None = None) -> QuantExperts:
        gate, up = experts.gate_up_proj.detach().chunk(2, 1)
        new = cls(format, len(gate), gate.shape[2], gate.shape[1])
        new.up = pack_up(gate, up, format, importance).data
        new.down = quantise(experts.down_proj.detach(), format).data
        return new

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, load: Tensor) -> Tensor:
        """As `Experts.forward`; the load is not needed here."""
        up = Packed(self.up, 2 * self.inner, self.hidden, self.format)
        down = Packed(self.down, self.hidden, self.inner, self.format)
        return quantised_experts(x, ids, weights, up, down).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.up)} of {self.hidden} x {self.inner}, {self.format.kind} in groups of {self.format.group}"


class QuantSwiGLU(nn.Module):
    """A dense feed-forward as one expert that every token chooses: one call instead of five."""

    up: Tensor
    down: Tensor

    def __init__(self, format: Format, hidden: int, inner: int) -> None:
        super().__init__()
        self.format, self.hidden, self.inner = format, hidden, inner
        self.register_buffer("up", torch.cat([empty(format, inner, hidden) for _ in range(2)]))
        self.register_buffer("down", empty(format, hidden, inner))

    @classmethod
    def of(cls, mlp: SwiGLU, format: Format, inputs: Tensor | None, middle: Tensor | None) -> QuantSwiGLU:
        gate, up, down = (p.weight.detach() for p in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        new = cls(format, gate.shape[1], gate.shape[0])
        new.up = torch.cat([quantise(w, format, inputs).data for w in (gate, up)])
        new.down = quantise(down, format, middle).data
        return new

    def forward(self, x: Tensor) -> Tensor:
        """x [*L, D] → [*L, D]."""
        flat = x.reshape(-1, self.hidden)
        up = Packed(self.up[None], 2 * self.inner, self.hidden, self.format)
        down = Packed(self.down[None], self.hidden, self.inner, self.format)
        ids = torch.zeros(len(flat), 1, dtype=torch.long, device=x.device)
        y = quantised_experts(flat, ids, torch.ones(ids.shape, device=x.device), up, down)
        return y.view(x.shape).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.hidden} x {self.inner}, {self.format.kind} in groups of {self.format.group}"


class QuantAbsorbed(nn.Module):
    """kv_b_proj's halves by head, for the absorbed form; `MLA.absorbed`. The keys' half is needed across there, rows
    of latents instead of keys, so kv_b_proj itself is kept beside it for the expanded form."""

    keys: Tensor  # [H, C, n]
    values: Tensor  # [H, v, C]

    def __init__(self, format: Format, heads: int, key_dim: int, value_dim: int, rank: int) -> None:
        super().__init__()
        self.format, self.key_dim, self.value_dim, self.rank = format, key_dim, value_dim, rank
        self.register_buffer("keys", empty(format, rank, key_dim, heads))
        self.register_buffer("values", empty(format, value_dim, rank, heads))

    @classmethod
    def of(cls, attn: MLA, format: Format) -> QuantAbsorbed:
        keys, values = attn.kv_b_weight().detach().split([attn.qk_nope_head_dim, attn.v_head_dim], 1)
        new = cls(format, len(keys), keys.shape[1], values.shape[1], attn.kv_lora_rank)
        new.keys, new.values = quantise(keys.mT, format).data, quantise(values, format).data
        return new

    def query(self, q_nope: Tensor) -> Tensor:
        """As `MLA.absorb_query`."""
        return quantised_heads(q_nope, Packed(self.keys, self.rank, self.key_dim, self.format)).to(
            q_nope.dtype
        )

    def output(self, latent: Tensor) -> Tensor:
        """As `MLA.expand_output`."""
        packed = Packed(self.values, self.value_dim, self.rank, self.format)
        return quantised_heads(latent, packed).to(latent.dtype)


PACKED = (QuantLinear, QuantEmbedding, QuantExperts, QuantSwiGLU, QuantAbsorbed)


def is_packed(model: nn.Module) -> bool:
    """Whether a model has quantised matrices."""
    return any(isinstance(m, PACKED) for m in model.modules())
