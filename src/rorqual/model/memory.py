"""Tables that a token reads instead of computing: parameters without matrix products.

They help small models much and large ones little (nanochat's log found the pair table's gain gone at depth
25); `rorqual cost` shows their size apart from the FLOPs.
"""

from __future__ import annotations

from typing import NamedTuple

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


class Induction(nn.Module):
    """What followed the last tokens when they stood in the context before: each layer adds its row and that of the
    match's length, by a weight that is learned for the length. What a pair of attention layers must learn (induction
    heads, arXiv 2209.11895) is looked up instead, as by the n-gram heads of arXiv 2401.12973: integers, and no product.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.longest = config.induction
        # A row for every token that may follow, then one for every length.
        self.weight = nn.Parameter(torch.empty(config.vocab_size + config.induction, config.hidden_size))
        self.scale = nn.Parameter(torch.empty(config.num_hidden_layers, config.induction))

    def forward(self, found: Found) -> tuple[Tensor, Tensor]:
        """→ each layer's weights [layers, *L, 1], 0 without a match, and rows [*L, D]."""
        scale = nn.functional.pad(self.scale, (1, 0))[:, found.lengths]
        length = len(self.weight) - self.longest + (found.lengths - 1).clamp(min=0)
        rows = nn.functional.embedding(found.ids, self.weight) + nn.functional.embedding(length, self.weight)
        return scale[..., None], rows


class Found(NamedTuple):
    """For every token: the token that followed the latest earlier occurrence of the longest run of tokens that ends
    here, and that run's length, 0 where there is none. Both [*L]."""

    ids: Tensor
    lengths: Tensor


def followers(ids: Tensor, first: Tensor, longest: int) -> Found:
    """Look up each token of ids [B, T] in what is before it in its document; `first` [B, T]: where documents begin.

    Equal runs are found by sorting: a run of n tokens is a pair of the run of n - 1 before it and its last token.
    """
    count = ids.numel()
    begins = first.clone()
    begins[:, 0] = True
    tokens = ids.flatten().long()
    # A document's number is part of its tokens, so that no run is found in another.
    own, earlier = _ranked(tokens + begins.flatten().cumsum(0) * (tokens.max() + 1))
    at, lengths, ranks = earlier, (earlier >= 0).long(), own
    for length in range(2, longest + 1):
        before = nn.functional.pad(ranks[:-1], (1, 0), value=count)
        ranks, earlier = _ranked(before * count + own)
        at = torch.where(earlier >= 0, earlier, at)
        lengths = torch.where(earlier >= 0, length, lengths)
    return Found(tokens[at + 1].view_as(ids), lengths.view_as(ids))


def _ranked(keys: Tensor) -> tuple[Tensor, Tensor]:
    """keys [N] → a number below N for each different key, and the place of the latest equal one before it, or -1."""
    ordered, order = keys.sort(stable=True)
    same = nn.functional.pad(ordered[1:] == ordered[:-1], (1, 0))
    ranks, earlier = torch.empty_like(order), torch.empty_like(order)
    ranks[order] = (~same).cumsum(0) - 1
    earlier[order] = torch.where(same, order.roll(1), -1)
    return ranks, earlier


def followers_reference(ids: Tensor, seen: Tensor, previous: Tensor, longest: int) -> Found:
    """The definition, for contexts of any form. seen [B, T, T]: which tokens k are no later than i and of its
    context; previous [B, T]: the place of the token before each, its own where there is none."""
    before = ids.gather(1, previous)
    place = torch.arange(ids.shape[1], device=ids.device)
    starts = previous == place
    # match[i, k]: the run that ends at i also ends right before k
    single = seen & ~starts[:, None] & (before[:, None] == ids[:, :, None])
    match, at, lengths = single, torch.zeros_like(ids), torch.zeros_like(ids)
    for length in range(1, longest + 1):
        if length > 1:
            shorter = match.gather(1, previous[:, :, None].expand_as(match))
            shorter = shorter.gather(2, previous[:, None].expand_as(match))
            match = single & shorter & ~starts[:, :, None]
        latest = torch.where(match, place, -1).amax(-1)
        at = torch.where(latest >= 0, latest, at)
        lengths = torch.where(latest >= 0, length, lengths)
    return Found(ids.gather(1, at), lengths)


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
