"""One step of the model over a flat batch of scheduled tokens."""

from __future__ import annotations

from array import array
from collections import defaultdict
from collections.abc import Sequence
from itertools import accumulate, repeat

import torch
from torch import Tensor

from rorqual.engine.adapters import Adapter
from rorqual.engine.cache import PagedCache
from rorqual.engine.decoder import decoder
from rorqual.engine.paged import Paged, Span, slots
from rorqual.engine.scheduler import Work
from rorqual.kernels.paged import PagedRows
from rorqual.model.memory import Found
from rorqual.model.moe import Routing
from rorqual.model.transformer import Transformer


class Runner:
    """Turns work into hidden states: gathers tokens, positions and slots and runs the layers once, where the cache is."""

    def __init__(self, model: Transformer, cache: PagedCache, block_size: int, alone: bool = False) -> None:
        self.model, self.cache, self.block_size = model, cache, block_size
        # Each piece of work and each row of logits by itself, so that neighbours cannot change a bit.
        self.alone = alone
        self.moe_layers = sorted(
            layer for layer, _ in model.routers() if layer < model.config.num_hidden_layers
        )
        self.decoder = None if alone else decoder(model, cache)

    def record_experts(self) -> None:
        """From now on keep beside each cached token which experts computed it."""
        shape = (self.cache.slots, len(self.moe_layers), self.model.config.num_experts_per_tok)
        self.cache.experts = torch.zeros(shape, dtype=torch.int16, device=self.cache.device)

    @torch.inference_mode()
    def run(self, works: Sequence[Work]) -> Tensor:
        """Hidden states [N, D] of all scheduled tokens, in the order of `works`; those of one adapter together."""
        if self.alone:
            models = [self.model if w.sequence.adapter is None else w.sequence.adapter.model for w in works]
            return torch.cat([self._run(m, [w]) for m, w in zip(models, works, strict=True)])
        groups = _by_weights(works)
        parts: list[Tensor] = [torch.empty(0)] * len(works)
        for adapter, members in groups.items():
            own = [works[i] for i in members]
            h = self._run(self.model if adapter is None else adapter.model, own)
            if len(groups) == 1:
                return h
            found = h.split([w.count for w in own])
            for i, part in zip(members, found, strict=True):
                parts[i] = part
        return torch.cat(parts)

    def _run(self, model: Transformer, works: Sequence[Work]) -> Tensor:
        if self.decoder is not None and self.decoder.moved:
            self.decoder = decoder(self.model, self.cache)
        fast = self.decoder
        if fast is None or model is not self.model or sum(w.count for w in works) > fast.most_rows:
            return self._run_any(model, works)
        return self._run_few(works)

    def _run_few(self, works: Sequence[Work]) -> Tensor:
        """All layers in one call: its inputs are made from lists, each in one piece."""
        assert self.decoder is not None
        size = self.block_size
        ids, positions, slots = array("q"), array("q"), array("q")
        requests, lengths, table = array("i"), array("i"), array("i")
        longest = max(-(-(w.start + w.count) // size) for w in works)
        for i, work in enumerate(works):
            s, start, end = work.sequence, work.start, work.start + work.count
            tokens = s.tokens if not s.draft else s.tokens + s.draft
            for p in range(start, end):
                ids.append(tokens[p])
                positions.append(p)
                slots.append(s.blocks[p // size] * size + p % size)
                requests.append(i)
                lengths.append(p + 1)
            table.extend(s.blocks[:longest])
            table.extend(repeat(0, longest - min(len(s.blocks), longest)))
        rows = PagedRows(_ints(table).view(-1, longest), _ints(requests), _ints(lengths), size)
        cos, sin = self.model.rope(_longs(positions))
        x = self.model.embed(_longs(ids)).float().contiguous()
        where, kept = _longs(slots), self.cache.experts
        layers, k = self.decoder.experts
        chosen = None if kept is None else torch.empty(layers, len(ids), k, dtype=torch.int64)
        h: Tensor = self.model.norm(self.decoder.run(x, cos, sin, where, rows, chosen))
        if kept is not None and chosen is not None:
            kept[where] = chosen.transpose(0, 1).to(torch.int16)
        return h

    def _run_any(self, model: Transformer, works: Sequence[Work]) -> Tensor:
        ids: list[int] = []
        back = range(1, model.looks_back + 1)
        before: list[list[int]] = [[] for _ in back]
        positions: list[int] = []
        spans: list[Span] = []
        followed: list[int] = []
        matched: list[int] = []
        for work in works:
            tokens, end = work.sequence.tokens + work.sequence.draft, work.start + work.count
            if model.induction is not None:
                found_ids, lengths = work.sequence.lookup(model.induction.longest).find(
                    tokens, work.start, end
                )
                followed += found_ids
                matched += lengths
            spans.append(self._span(len(ids), work.start, work.count, work.sequence.blocks))
            ids += tokens[work.start : end]
            for one, n in zip(before, back, strict=True):
                one += [tokens[max(at - n, 0)] for at in range(work.start, end)]
            positions += range(work.start, end)
        found = Found(self._tensor(followed), self._tensor(matched)) if model.induction is not None else None
        attend = Paged(self.cache, spans, tuple(self._tensor(x) for x in before), found)
        routing = None if self.cache.experts is None else Routing()
        h: Tensor = model(self._tensor(ids), self._tensor(positions), attend, routing)
        if self.cache.experts is not None and routing is not None:
            chosen = torch.stack([routing.chosen[layer] for layer in self.moe_layers], 1)
            self.cache.experts[attend.new_slots] = chosen.to(torch.int16)
        return h

    @torch.inference_mode()
    def guess(self, works: Sequence[Work], h: Tensor) -> None:
        """Let the first multi-token prediction module guess the token after the newest of each sequence, from the hidden
        states [N, D] that `run` gave; its cache is filled along the way. A block that others share was filled by whoever
        came first, whose next token may be another: a wrong guess costs a little time, never a token.
        """
        starts = list(accumulate((w.count for w in works), initial=0))
        for adapter, members in _by_weights(works).items():
            model = self.model if adapter is None else adapter.model
            ids: list[int] = []
            positions: list[int] = []
            spans: list[Span] = []
            rows: list[int] = []
            for i in members:
                work, first = works[i], starts[i]
                s = work.sequence
                count = s.computed - work.start  # guesses that were wrong are not in it
                spans.append(self._span(len(ids), work.start, count, s.blocks))
                ids += s.tokens[work.start + 1 : s.computed + 1]
                positions += range(work.start, s.computed)
                rows += range(first, first + count)
            attend = Paged(self.cache, spans, ())
            further = model.predict_further(0, h[rows], self._tensor(ids), self._tensor(positions), attend)
            last = [span.row + span.count - 1 for span in spans]
            best = model.logits(further[last]).argmax(-1).tolist()
            for i, token in zip(members, best, strict=True):
                s = works[i].sequence
                s.guess = [token] if s.computed + 1 == len(s.tokens) else []  # a prompt's middle needs none

    def experts(self, blocks: Sequence[int], length: int) -> Tensor:
        """What was recorded of a sequence's first `length` tokens [length, MoE layers, K]."""
        assert self.cache.experts is not None
        return self.cache.experts[slots(self._tensor(blocks), 0, length, self.block_size)].cpu()

    @torch.inference_mode()
    def logits(self, h: Tensor) -> Tensor:
        """h [M, D] → [M, V] float32, on the CPU, where tokens are drawn."""
        if self.alone:
            return torch.cat([self.model.logits(row[None]) for row in h]).float().cpu()
        return self.model.logits(h).float().cpu()

    def _tensor(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers).to(self.cache.device)

    def _span(self, row: int, start: int, count: int, blocks: Sequence[int]) -> Span:
        used = -(-(start + count) // self.block_size)
        return Span(row, start, count, self._tensor(blocks[:used]), self.block_size)


def _longs(numbers: array[int]) -> Tensor:
    """Over the same memory: several times faster than from a list."""
    return torch.frombuffer(numbers, dtype=torch.int64)


def _ints(numbers: array[int]) -> Tensor:
    return torch.frombuffer(numbers, dtype=torch.int32)


def _by_weights(works: Sequence[Work]) -> dict[Adapter | None, list[int]]:
    """Which of the works share an adapter, or the model's own weights."""
    groups: dict[Adapter | None, list[int]] = defaultdict(list)
    for i, work in enumerate(works):
        groups[work.sequence.adapter].append(i)
    return groups
