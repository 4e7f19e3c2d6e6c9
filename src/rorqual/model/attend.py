"""Attention contexts: who may see what, and where keys come from. Layers own weights; a context owns cache
and mask.

`Causal` serves training and prefill of whole rows, `Cached` one contiguous cache; the engine brings a paged
one.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from rorqual.kernels import causal
from rorqual.kernels.attention import attention, attention_reference
from rorqual.model.memory import Found, followers, followers_reference

if TYPE_CHECKING:
    from rorqual.model.gqa import GQA
    from rorqual.model.mla import MLA

Form = Literal["auto", "expanded", "absorbed"]


class Attend(Protocol):
    """What an attention layer asks of its surroundings. *L is any leading shape: [B, T], or [N] in the
    engine."""

    def mla(
        self, layer: int, attn: MLA, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor
    ) -> Tensor:
        """q_nope [*L, H, n], q_rope [*L, H, R] rotated, c_kv [*L, C], k_rope [*L, R] rotated → [*L, H, v]."""

    def gqa(self, layer: int, attn: GQA, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [*L, H, D], k [*L, Hkv, D], v [*L, Hkv, D] → [*L, H, D]."""

    def previous_ids(self, ids: Tensor, count: int) -> tuple[Tensor, ...]:
        """The token before each of `ids` [*L], the one before that, … `count` of them; where none is, the earliest
        that is there."""

    def followers(self, ids: Tensor, longest: int) -> Found:
        """What followed the runs of up to `longest` tokens that end with each of `ids` [*L] when they stood in its
        context before."""


class Causal:
    """Rows [B, T] that attend to themselves; with `document_ids` [B, T], only within one document."""

    def __init__(self, document_ids: Tensor | None = None, plain: bool = False) -> None:
        self.document_ids = document_ids
        self.plain = plain  # the definition instead of the fused op, for tests
        self._mask: Tensor | None = None

    def mla(
        self, layer: int, attn: MLA, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor
    ) -> Tensor:
        k_nope, v = attn.expand(c_kv)
        parts = (k_nope, k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], -1))
        # Heads move to the front before the parts are joined: joining copies anyway.
        q = torch.cat((q_nope.transpose(1, 2), q_rope.transpose(1, 2)), -1)
        k = torch.cat([x.transpose(1, 2) for x in parts], -1)
        return self._attend(q, k, v.transpose(1, 2), attn.scale)

    def gqa(self, layer: int, attn: GQA, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn.scale)

    def previous_ids(self, ids: Tensor, count: int) -> tuple[Tensor, ...]:
        found = []
        for _ in range(count):
            ids = self._shifted(ids)
            found.append(ids)
        return tuple(found)

    def followers(self, ids: Tensor, longest: int) -> Found:
        return followers(ids, self._first(ids), longest)

    def _shifted(self, ids: Tensor) -> Tensor:
        """Each token's predecessor; a document's first token is its own."""
        return torch.where(self._first(ids), ids, ids.roll(1, -1))

    def _first(self, ids: Tensor) -> Tensor:
        """Where documents begin [B, T]."""
        d = self.document_ids
        first = torch.zeros_like(ids, dtype=torch.bool)
        first[..., 0] = True
        if d is not None:
            first[..., 1:] = d[..., 1:] != d[..., :-1]
        return first

    def mask(self, length: int, device: torch.device) -> Tensor:
        """[B or 1, 1, T, T]: true where the key is no later and of the same document."""
        if self._mask is None:
            self._mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()[None, None]
            if self.document_ids is not None:
                d = self.document_ids
                self._mask = self._mask & (d[:, None, :, None] == d[:, None, None, :])
        return self._mask

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """q, k [B, H, T, D], v [B, H, T, Dv] → [B, T, H, Dv]."""
        length = q.shape[2]
        if self.plain:
            out = attention_reference(q, k, v, scale, self.mask(length, q.device))
        elif causal.fits(q, k, v) or (
            q.device.type == "cpu" and torch.is_grad_enabled() and length <= causal.LONGEST
        ):
            out = causal.causal_attention(q, k, v, scale, self.document_ids)
        elif self.document_ids is None:
            out = attention(q, k, v, scale, causal=True)
        else:
            out = attention(q, k, v, scale, mask=self.mask(length, q.device))
        return out.transpose(1, 2)


class Tree(Causal):
    """Rows [B, T] that are a beginning and several ways to go on, each of which sees the beginning and itself.

    branch [B, T]: 0 the beginning, 1, 2, … the ways, -1 padding; previous [B, T]: the place of the token before.
    """

    def __init__(self, branch: Tensor, previous: Tensor) -> None:
        super().__init__()
        self._previous = previous
        self._branch = branch
        own = branch[:, None] == branch[:, :, None]
        self._start = own.int().argmax(-1).int()  # where each token's own branch begins
        self._shared = (branch == 0).sum(1, keepdim=True).expand_as(branch).int().contiguous()

    def mask(self, length: int, device: torch.device) -> Tensor:
        """[B, 1, T, T]: true where the key is no later and of the beginning or the same branch."""
        if self._mask is None:
            seen = (self._branch[:, None] == self._branch[:, :, None]) | (self._branch == 0)[:, None]
            self._mask = (seen & torch.ones(length, length, dtype=torch.bool).tril())[:, None]
        return self._mask

    def followers(self, ids: Tensor, longest: int) -> Found:
        return followers_reference(ids, self.mask(ids.shape[1], ids.device)[:, 0], self._previous, longest)

    def _shifted(self, ids: Tensor) -> Tensor:
        return ids.gather(1, self._previous)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        if causal.fits(q, k, v):
            return causal.seen_attention(q, k, v, scale, self._shared, self._start).transpose(1, 2)
        return attention(q, k, v, scale, mask=self.mask(q.shape[2], q.device)).transpose(1, 2)


@dataclass
class KVCache:
    """A contiguous cache: per layer the latent pair (c_kv [B, S, C], k_rope [B, S, R]) or k and v [B, S, Hkv,
    D].

    `length` counts the tokens that are in; a forward pass over T tokens adds T to it once all layers have
    run.
    """

    layers: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    ids: Tensor | None = None  # [B, S], for models that look back

    def extend(self, layer: int, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Append [B, T, …] to a layer and return the whole of it [B, S, …]."""
        if layer in self.layers:
            old_first, old_second = self.layers[layer]
            first, second = torch.cat((old_first, first), 1), torch.cat((old_second, second), 1)
        self.layers[layer] = (first, second)
        return first, second

    @property
    def length(self) -> int:
        return self.layers[0][0].shape[1] if 0 in self.layers else 0


class Cached:
    """New tokens [B, T] after the S - T that the cache holds; every row has the same length.

    `form` chooses how MLA is computed; "auto" takes the absorbed form where the cache is longer than the
    chunk.
    """

    def __init__(self, cache: KVCache, form: Form = "auto", plain: bool = True) -> None:
        self.cache = cache
        self.form = form
        self.plain = plain

    def mla(
        self, layer: int, attn: MLA, q_nope: Tensor, q_rope: Tensor, c_kv: Tensor, k_rope: Tensor
    ) -> Tensor:
        new = c_kv.shape[1]
        c_kv, k_rope = self.cache.extend(layer, c_kv, k_rope)
        absorbed = self.form == "absorbed" or (self.form == "auto" and c_kv.shape[1] > 2 * new)
        if absorbed:
            q = torch.cat((attn.absorb_query(q_nope), q_rope), -1)
            k = torch.cat((c_kv, k_rope), -1).unsqueeze(2)
            return attn.expand_output(self._attend(q, k, c_kv.unsqueeze(2), attn.scale))
        k_nope, v = attn.expand(c_kv)
        k = torch.cat((k_nope, k_rope.unsqueeze(-2).expand(*k_nope.shape[:-1], -1)), -1)
        return self._attend(torch.cat((q_nope, q_rope), -1), k, v, attn.scale)

    def gqa(self, layer: int, attn: GQA, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = self.cache.extend(layer, k, v)
        return self._attend(q, k, v, attn.scale)

    def previous_ids(self, ids: Tensor, count: int) -> tuple[Tensor, ...]:
        known = self._known(ids)
        at = torch.arange(known.shape[1] - ids.shape[1], known.shape[1], device=ids.device)
        return tuple(known[:, (at - back).clamp(min=0)] for back in range(1, count + 1))

    def followers(self, ids: Tensor, longest: int) -> Found:
        known = self._known(ids)
        found = followers(known, torch.zeros_like(known, dtype=torch.bool), longest)
        return Found(*(x[:, -ids.shape[1] :] for x in found))

    def _known(self, ids: Tensor) -> Tensor:
        """All tokens up to the new ones; asked before the layers add them to the cache."""
        old = self.cache.ids
        self.cache.ids = ids if old is None else torch.cat((old[:, : self.cache.length], ids), 1)
        return self.cache.ids

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        new, total = q.shape[1], k.shape[1]
        mask = torch.ones(new, total, dtype=torch.bool, device=q.device).tril(total - new)[None, None]
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        op = attention_reference if self.plain else attention
        return op(q, k, v, scale, mask=mask).transpose(1, 2)
