"""Which part of each tensor a process holds: a rule that every process can work out for every other one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from torch import Tensor, nn

from rorqual.model.gqa import GQA
from rorqual.model.mla import MLA
from rorqual.model.moe import MoE
from rorqual.model.transformer import Transformer
from rorqual.parallel.config import Parallel
from rorqual.parallel.mesh import Kind, Mesh, Team


@dataclass(frozen=True)
class Piece:
    """A box of a tensor: from `start`, of `size`, in each dimension of `shape`."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Piece:
        return cls(shape, (0,) * len(shape), shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        return tuple(slice(a, a + n) for a, n in zip(self.start, self.size, strict=True))

    def narrow(self, dim: int, parts: int, index: int) -> Piece:
        """Part number `index` of `parts` along a dimension, as torch.chunk cuts: the last ones may be smaller."""
        each = -(-self.size[dim] // parts)
        begin = min(index * each, self.size[dim])
        n = min(each, self.size[dim] - begin)
        start, size = list(self.start), list(self.size)
        start[dim], size[dim] = start[dim] + begin, n
        return Piece(self.shape, tuple(start), tuple(size))

    def finer(self, factor: int) -> Piece:
        """The same part of the tensor with its first dimension split `factor` times finer, its second coarser."""
        shape, start, size = (
            (x[0] * factor, x[1] // factor, *x[2:]) for x in (self.shape, self.start, self.size)
        )
        return Piece(shape, start, size)

    def of_rows(self) -> Piece:
        """The same part of a tensor with one column."""
        return Piece((*self.shape[:-1], 1), (*self.start[:-1], 0), (*self.size[:-1], 1))


@dataclass(frozen=True)
class Placement:
    """How a parameter lies: `splits` are (dimension, team that divides it), in order; its gradients are sums over the
    team `reduce`, which also divides dimension 0 where `sharded`."""

    shape: tuple[int, ...]
    splits: tuple[tuple[int, Kind], ...] = ()
    reduce: Kind = "data"
    sharded: bool = False

    @property
    def cuts(self) -> tuple[tuple[int, Kind], ...]:
        return (*self.splits, (0, self.reduce)) if self.sharded else self.splits

    def piece(self, mesh: Mesh, rank: int | None = None) -> Piece:
        """What a rank (None: this one) holds."""
        rank = mesh.rank if rank is None else rank
        found = Piece.whole(self.shape)
        for dim, kind in self.cuts:
            found = found.narrow(dim, mesh.teams[kind].size, mesh.index(kind, rank))
        return found

    def holders(self, mesh: Mesh) -> int:
        """How many processes hold the same part."""
        return mesh.world // prod(mesh.teams[kind].size for _, kind in self.cuts)

    def owned(self, mesh: Mesh) -> bool:
        """Whether this process is the first of those that hold its part."""
        mine = self.piece(mesh)
        return all(self.piece(mesh, r) != mine for r in range(mesh.rank))


@dataclass(frozen=True)
class Layout:
    """The placements of a model's parameters by name; a name that is not there is whole on every process."""

    mesh: Mesh
    placements: Mapping[str, Placement] = field(default_factory=dict)

    def of(self, name: str, shape: tuple[int, ...] = ()) -> Placement:
        return self.placements.get(name) or Placement(shape)

    def team(self, kind: Kind) -> Team:
        return self.mesh.teams[kind]


def layout(model: Transformer, mesh: Mesh, parallel: Parallel) -> Layout:
    """Where every parameter of a whole model goes."""
    if mesh.world == 1:
        return Layout(mesh)
    found = {}
    for name, p in model.named_parameters():
        splits, reduce = _rule(model, name.rpartition(".")[0], mesh)
        sharded = parallel.shard and mesh.teams[reduce].size > 1
        found[name] = Placement(tuple(p.shape), splits, reduce, sharded)
    return Layout(mesh, found)


HEADS_FIRST = ("q_proj", "q_b_proj", "kv_b_proj", "k_proj", "v_proj")  # rows by head


def _rule(model: Transformer, owner: str, mesh: Mesh) -> tuple[tuple[tuple[int, Kind], ...], Kind]:
    """How a module's parameters are divided, and over whom their gradients are summed."""
    path = owner.split(".")
    around = [model.get_submodule(".".join(path[:i])) for i in range(1, len(path) + 1)]
    if any(isinstance(m, MLA | GQA) for m in around):
        if mesh.tensor > 1 and path[-1] in HEADS_FIRST:
            return ((0, "tensor"),), "data"
        if mesh.tensor > 1 and path[-1] == "o_proj":
            return ((1, "tensor"),), "data"
        return (), "world"  # each process sees what its own heads make of it
    if path[-1] == "experts":
        return (((0, "expert"),) if mesh.expert > 1 else ()), "copies"
    if path[-1] == "router":
        return (), "data"
    if any(isinstance(m, MoE) for m in around) or "mlp" in path:
        return (), "world"  # each process of a tensor team takes some of the tokens
    return (), "data"


def local(t: Tensor) -> Tensor:
    """A parameter's or gradient's own part, where it is a sharded one."""
    mine = getattr(t, "to_local", None)  # a DTensor has it; importing that class takes seconds
    return t if mine is None else mine()


def cut_(module: nn.Module, name: str, piece: Piece) -> None:
    """Replace a parameter by a part of it."""
    whole = getattr(module, name)
    setattr(module, name, nn.Parameter(whole.detach()[piece.slices].clone()))
