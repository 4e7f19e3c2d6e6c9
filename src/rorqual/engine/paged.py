"""The engine's attention context: a flat batch of tokens from many sequences over the paged cache.

Sequences that decode (one new token each) are computed together on padded rows; chunks of a prompt one by one.
MLA takes the absorbed form for decoding and where the cached context outweighs the chunk, else the expanded one.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rorqual.engine.cache import PagedCache
from rorqual.kernels.attention import attention
from rorqual.kernels.causal import fits, seen_attention
from rorqual.kernels.gqa_attention import gqa_attention
from rorqual.kernels.mla_attention import mla_attention
from rorqual.kernels.native import native
from rorqual.kernels.paged import PagedRows
from rorqual.kernels.triton import has_triton
from rorqual.model.memory import Found

if TYPE_CHECKING:
    from rorqual.model.gqa import GQA
    from rorqual.model.mla import MLA


@dataclass(frozen=True)
class Span:
    """`count` new tokens of one sequence at row `row` of the batch, after `start` cached ones, and the blocks of all."""

    row: int
    start: int
    count: int
    blocks: Tensor  # [ceil((start + count) / block_size)]
    block_size: int

    @property
    def total(self) -> int:
        return self.start + self.count

    @cached_property
    def slots(self) -> Tensor:
        """Cache rows of all its tokens [start + count]."""
        return slots(self.blocks, 0, self.total, self.block_size)

    @property
    def new_slots(self) -> Tensor:
        """Cache rows of the new ones [count]."""
        return slots(self.blocks, self.start, self.total, self.block_size)


def slots(blocks: Tensor, start: int, end: int, block_size: int) -> Tensor:
    """Cache rows of the tokens from `start` to `end` of a sequence."""
    at = torch.arange(start, end, device=blocks.device)
    return blocks[at // block_size] * block_size + at % block_size


class Paged:
    """Built once a step; all layers share its gather indices and masks."""

    def __init__(
        self,
        cache: PagedCache,
        spans: Sequence[Span],
        previous: tuple[Tensor, ...],
        found: Found | None = None,
    ) -> None:
        self.cache = cache
        self._previous, self._found = previous, found
        self.new_slots = torch.cat([s.new_slots for s in spans])
        self._chunks = [s for s in spans if s.count > 1 or s.start == 0]
        decodes = [s for s in spans if s.count == 1 and s.start > 0]
        device = cache.device
        self._rows = torch.tensor([s.row for s in decodes], dtype=torch.long).to(device)
        self._native: PagedRows | None = None
        # Kernels that follow block tables: natively on a CPU, in Triton on CUDA (latents alone).
        self._fast = native() is not None if device.type == "cpu" else bool(cache.latent) and has_triton()
        if decodes and self._fast:
            lengths = torch.tensor([s.total for s in decodes], dtype=torch.int32).to(device)
            table = torch.nn.utils.rnn.pad_sequence([s.blocks for s in decodes], batch_first=True).int()
            requests = torch.arange(len(decodes), dtype=torch.int32, device=device)
            self._native = PagedRows(table, requests, lengths, decodes[0].block_size)
        elif decodes:
            totals = [s.total for s in decodes]
            longest = max(totals)
            at = torch.arange(longest, device=device)
            # Shorter ones are padded with a slot of their own: 0 x NaN of another's row would be NaN.
            self._gather = torch.stack([s.slots[at.clamp(max=s.total - 1)] for s in decodes])
            seen = at < torch.tensor(totals).to(device)[:, None]
            self._mask = seen[:, None, None]
            self._even = min(totals) == longest

    def previous_ids(self, ids: Tensor, count: int) -> tuple[Tensor, ...]:
        return self._previous[:count]

    def followers(self, ids: Tensor, longest: int) -> Found:
        assert self._found is not None
        return self._found

    def mla(
        self, layer: int, attn: MLA, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor
    ) -> Tensor:
        rows = self.cache.latent[layer]
        new = torch.cat((c_kv, k_rope), -1)
        self.cache.write(rows, self.new_slots, new)
        out = q_nope.new_empty(*q_nope.shape[:2], attn.v_head_dim)
        if len(self._rows):
            q = torch.cat((attn.absorb_query(q_nope[self._rows]), q_rope[self._rows]), -1)
            out[self._rows] = attn.expand_output(self._decode_latent(q, rows, attn))
        for span in self._chunks:
            part = slice(span.row, span.row + span.count)
            seen = self.cache.read(rows, span.slots, new)
            out[part] = self._chunk_latent(q_nope[part], q_rope[part], seen, span, attn)
        return out

    def gqa(self, layer: int, attn: GQA, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = self.cache.keys[layer], self.cache.values[layer]
        self.cache.write(keys, self.new_slots, k)
        self.cache.write(values, self.new_slots, v)
        out = torch.empty_like(q)
        if self._native is not None:
            out[self._rows] = gqa_attention(q[self._rows], keys, values, self._native, attn.scale).to(q.dtype)
        elif len(self._rows):
            mask = None if self._even else self._mask
            k_all, v_all = (self.cache.read(x, self._gather, q).transpose(1, 2) for x in (keys, values))
            out[self._rows] = attention(q[self._rows].unsqueeze(2), k_all, v_all, attn.scale, mask).squeeze(2)
        for span in self._chunks:
            part = slice(span.row, span.row + span.count)
            k_all, v_all = (self.cache.read(x, span.slots, q).transpose(0, 1)[None] for x in (keys, values))
            result = _causal_tail(q[part].transpose(0, 1)[None], k_all, v_all, attn.scale, span)
            out[part] = result[0].transpose(0, 1)
        return out

    def _decode_latent(self, q: Tensor, rows: Tensor, attn: MLA) -> Tensor:
        """q [B, H, C + R] against the cached rows of each request → [B, H, C]; without the native kernel on padded
        copies of them, heads being rows of one product."""
        if self._native is not None:
            return mla_attention(q, rows, self._native, attn.kv_lora_rank, attn.scale).to(q.dtype)
        keys = self.cache.read(rows, self._gather, q)  # [B, S, C + R]
        scores = (q @ keys.mT).float() * attn.scale
        if not self._even:
            scores = scores.masked_fill(~self._mask[:, 0], float("-inf"))
        return scores.softmax(-1).to(q.dtype) @ keys[..., : attn.kv_lora_rank]

    def _chunk_latent(self, q_nope: Tensor, q_rope: Tensor, rows: Tensor, span: Span, attn: MLA) -> Tensor:
        c_kv, k_rope = rows.split([attn.kv_lora_rank, attn.qk_rope_head_dim], -1)
        if absorbed_is_cheaper(span.count, span.total, attn):
            q = torch.cat((attn.absorb_query(q_nope), q_rope), -1)  # [T, H, C + R]
            if self._fast:
                seen = _tail_rows(span)
                return attn.expand_output(
                    mla_attention(q, rows, seen, attn.kv_lora_rank, attn.scale).to(q.dtype)
                )
            q = q.transpose(0, 1)[None]
            out = _causal_tail(q, rows[None, None], c_kv[None, None], attn.scale, span)
            return attn.expand_output(out[0].transpose(0, 1))
        k_nope, v = attn.expand(c_kv)
        k = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, attn.num_heads, -1)), -1)
        q = torch.cat((q_nope, q_rope), -1)
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return _causal_tail(q, k, v, attn.scale, span)[0].transpose(0, 1)


def absorbed_is_cheaper(new: int, total: int, attn: MLA) -> bool:
    """Compare the products of both forms for `new` queries over `total` keys.

    Absorbed: wide scores (C + R and C) and the two maps of each query. Expanded: narrow scores and keys and values
    of every cached token made again.
    """
    n, r, v, c = attn.qk_nope_head_dim, attn.qk_rope_head_dim, attn.v_head_dim, attn.kv_lora_rank
    absorbed = new * total * (2 * c + r) + new * c * (n + v)
    expanded = new * total * (n + r + v) + total * c * (n + v)
    return absorbed < expanded


def _tail_rows(span: Span) -> PagedRows:
    """The new tokens of one sequence over its gathered rows, each seeing up to itself."""
    total = span.total
    make = functools.partial(torch.arange, dtype=torch.int32, device=span.blocks.device)
    lengths, request = make(span.start + 1, total + 1), make(span.count) * 0
    return PagedRows(make(total)[None], request, lengths, 1)


def _causal_tail(q: Tensor, k: Tensor, v: Tensor, scale: float, span: Span) -> Tensor:
    """Attention of the last `count` of `start + count` positions: q [1, H, T, D], k and v [1, Hkv, S, …]."""
    if fits(q, k, v):
        return seen_attention(q, k, v, scale)
    if span.start == 0:
        return attention(q, k, v, scale, causal=True)
    total = span.start + span.count
    mask = torch.ones(span.count, total, dtype=torch.bool, device=q.device).tril(span.start)[None, None]
    return attention(q, k, v, scale, mask)
