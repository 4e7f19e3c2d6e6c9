"""Muon over many processes: matrices that lie in parts are put together, and each process orthogonalises some of them."""

from __future__ import annotations

import torch
from torch import Tensor

from rorqual.parallel.layout import Layout
from rorqual.parallel.mesh import Team
from rorqual.parallel.spread import joined
from rorqual.train import muon


class TeamWork(muon.Work):
    """The update of parameters that are placed as `name` is. Experts are whole matrices wherever they are; others may
    be cut along rows or columns."""

    def __init__(self, name: str, layout: Layout) -> None:
        self.name, self.layout = name, layout
        self.placement = layout.of(name)
        experts = len(self.placement.shape) > 2
        self.cut = bool(self.placement.cuts) and not experts
        self.together = self.cut
        self.team: Team | None = layout.team("copies" if experts else "world")
        if experts and self.placement.sharded:
            self.team = None  # nobody else has these

    def whole(self, parts: list[Tensor]) -> Tensor:
        return joined(parts, self.name, self.layout) if self.cut else torch.stack(parts)

    def orthogonal(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.team is None or self.team.size == 1:
            return muon.orthogonal(x, dtype)
        each = -(-len(x) // self.team.size)
        mine = x[self.team.index * each : (self.team.index + 1) * each]
        done = x.new_zeros(each, *x.shape[1:], dtype=dtype)
        if len(mine):
            done[: len(mine)] = muon.orthogonal(mine, dtype)
        return self.team.gather(done).flatten(0, 1)[: len(x)]

    def mine(self, updates: Tensor) -> Tensor:
        return updates[(slice(None), *self.placement.piece(self.layout.mesh).slices)] if self.cut else updates


def work_of(name: str, layout: Layout) -> muon.Work:
    """How a parameter's kind is updated."""
    return muon.WORK if layout.mesh.world == 1 else TeamWork(name, layout)
