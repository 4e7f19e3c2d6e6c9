"""The optimizer of a run: Muon for matrices and AdamW for the rest, or AdamW alone. State is saved by name."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rorqual.errors import RunError
from rorqual.parallel.layout import Layout, Piece, Placement, local
from rorqual.parallel.mesh import Mesh
from rorqual.train import muon
from rorqual.train.config import Optim
from rorqual.train.teamwork import work_of

EPS = 1e-8
Rule = Literal["muon", "adamw", "table"]


def kind(name: str, p: Tensor) -> str:
    """Which rule a parameter follows: matrix, embedding, table, head or vector."""
    if name in ("ngram.weight", "triples.weight"):
        return "table"
    value = name.startswith("value_embeddings") and ".gate." not in name
    if name.startswith("embed_tokens") or name == "induction.weight" or value:
        return "embedding"
    if name.startswith("lm_head"):
        return "head"
    small = p.dim() < 2 or min(p.shape[-2:]) == 1 or "router" in name or name in ("x0_mix", "induction.scale")
    return "vector" if small else "matrix"


@dataclass
class Member:
    """A parameter and its moments: AdamW's first and second, Muon's momentum and its rows' second moments, or a table's
    squares."""

    name: str
    param: Tensor
    moments: tuple[Tensor, ...]  # of this process's part


@dataclass
class Group:
    """Parameters that share a rule and a full rate; under Muon also their shape."""

    rule: Rule
    members: list[Member]
    lr: float
    decay: float
    work: muon.Work = muon.WORK

    @property
    def live(self) -> list[Member]:
        return [m for m in self.members if m.param.grad is not None]


class Optimizer:
    """`step(share)` applies one update at a share of the full rates. Moments are float32 whatever the gradients are.

    `dtype` is that of Muon's products; `layout` says what other processes hold of the parameters.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, Tensor]],
        config: Optim,
        dtype: torch.dtype = torch.float32,
        layout: Layout | None = None,
    ) -> None:
        self.config, self.dtype = config, dtype
        self.layout = layout or Layout(Mesh())
        self.count = 0
        found: dict[tuple[str, Placement | None], list[Member]] = defaultdict(list)
        for name, p in named:
            if not p.requires_grad:
                continue
            placement, part, which = self.layout.of(name, tuple(p.shape)), local(p), kind(name, p)
            if config.name == "muon" and which == "matrix":
                matrices = _matrices(name, part)
                rows = matrices if len(placement.shape) > 2 else part.new_empty(placement.shape)
                moments = (_zeros(matrices), _zeros(rows[..., :1]))
                found[which, placement].append(Member(name, p, moments))
            elif which == "table":
                found[which, None].append(Member(name, p, (_zeros(part),)))
            else:
                found[which, None].append(Member(name, p, (_zeros(part), _zeros(part))))
        self.groups = [self._group(which, members) for (which, _), members in found.items()]

    def _group(self, which: str, members: list[Member]) -> Group:
        c = self.config
        lr = {
            "matrix": c.lr, "embedding": c.embedding_lr, "table": c.table_lr, "head": c.head_lr, "vector": c.vector_lr,
        }[which]  # fmt: skip
        # Under Muon embeddings and head are not decayed; AdamW alone decays all but vectors and tables.
        decays = which == "matrix" or (c.name == "adamw" and which in ("embedding", "head"))
        muons = c.name == "muon" and which == "matrix"
        work = work_of(members[0].name, self.layout) if muons else muon.WORK
        rule: Rule = "muon" if muons else "table" if which == "table" else "adamw"
        return Group(rule, members, lr, c.weight_decay if decays else 0.0, work)

    @torch.no_grad()
    def step(self, share: float) -> None:
        """One update of every parameter that has a gradient."""
        self.count += 1
        for group in self.groups:
            if group.live:
                {"muon": self._muon, "adamw": self._adamw, "table": self._tables}[group.rule](group, share)

    def _muon(self, group: Group, share: float) -> None:
        c, live = self.config, [m for m in group.live if local(m.param).numel() or group.work.together]
        if not live:
            return
        warm = 1.0 if not c.momentum_warmup else min(self.count / c.momentum_warmup, 1.0)
        momentum = c.momentum_start + (c.momentum - c.momentum_start) * warm
        muon.muon_(
            [_matrices(m.name, local(m.param.data)) for m in live],
            [_matrices(m.name, _grad(m.param)) for m in live],
            [m.moments[0] for m in live],
            [m.moments[1] for m in live],
            muon.Rates(group.lr * share, momentum, group.decay, c.even_rows, self.dtype),
            group.work,
        )

    def _adamw(self, group: Group, share: float) -> None:
        live, steps = [m for m in group.live if local(m.param).numel()], torch.tensor(float(self.count))
        if not live:
            return
        beta1, beta2 = self.config.betas
        torch._fused_adamw_(
            [local(m.param.data) for m in live],
            [_grad(m.param) for m in live],
            [m.moments[0] for m in live],
            [m.moments[1] for m in live],
            [],
            [steps.to(live[0].param.device)] * len(live),
            lr=group.lr * share,
            beta1=beta1,
            beta2=beta2,
            weight_decay=group.decay,
            eps=EPS,
            amsgrad=False,
            maximize=False,
        )

    def _tables(self, group: Group, share: float) -> None:
        for m in group.live:
            table, (squares,), grad = local(m.param.data), m.moments, _grad(m.param)
            rows, own = touched(grad)
            kept = squares[rows].mul_(self.config.table_memory).addcmul_(own, own)
            squares[rows] = kept
            table.index_add_(0, rows, (own / kept.sqrt_().add_(EPS)).to(table.dtype), alpha=-group.lr * share)

    def state_dict(self) -> dict[str, Tensor]:
        """Every moment by parameter name, and the number of updates."""
        return {**dict(self._moments()), "count": torch.tensor(self.count)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take saved moments; raises RunError where they are not this model's."""
        own = dict(self._moments())
        wrong = sorted(set(own) ^ (set(state) - {"count"}))
        wrong += [n for n in own if n in state and own[n].shape != state[n].shape]
        if wrong or "count" not in state:
            raise RunError(
                f"optimizer state does not fit the model: {len(wrong)} tensors differ ({wrong[:1]})"
            )
        for name, moment in own.items():
            moment.copy_(state[name])
        self.count = int(state["count"])

    def pieces(self) -> dict[str, Piece]:
        """Which part of each moment this process holds."""
        found: dict[str, Piece] = {}
        for group in self.groups:
            for m in group.members:
                placement = self.layout.of(m.name, tuple(m.param.shape))
                piece = placement.piece(self.layout.mesh)
                if group.rule == "table":
                    found[f"{m.name}.squares"] = piece
                    continue
                if group.rule == "adamw":
                    found |= {f"{m.name}.first": piece, f"{m.name}.second": piece}
                    continue
                if m.name.endswith("experts.gate_up_proj"):
                    piece = piece.finer(2)
                rows = Piece.whole(piece.shape) if len(piece.shape) == 2 else piece
                found |= {f"{m.name}.momentum": piece, f"{m.name}.rows": rows.of_rows()}
        return found

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        for group in self.groups:
            names = {"muon": ("momentum", "rows"), "adamw": ("first", "second"), "table": ("squares",)}[
                group.rule
            ]
            for m in group.members:
                yield from ((f"{m.name}.{n}", moment) for n, moment in zip(names, m.moments, strict=True))


def adamw_reference(
    p: Tensor,
    grad: Tensor,
    first: Tensor,
    second: Tensor,
    step: int,
    lr: float,
    betas: tuple[float, float],
    decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition of AdamW (arXiv 1711.05101): the new parameter and moments after update number `step`."""
    first = betas[0] * first + (1 - betas[0]) * grad
    second = betas[1] * second + (1 - betas[1]) * grad.square()
    root = (second / (1 - betas[1] ** step)).sqrt() + EPS
    return p * (1 - lr * decay) - lr * first / (1 - betas[0] ** step) / root, first, second


def table_reference(
    p: Tensor, grad: Tensor, squares: Tensor, lr: float, memory: float
) -> tuple[Tensor, Tensor]:
    """The definition of a table's rule: AdaGrad (Duchi et al., 2011) that forgets, on rows whose gradient is not zero.
    A row that is read for the first time moves by `lr`, whenever that is; the others, and what is known of them, stay."""
    new = memory * squares + grad.square()
    moved = p - lr * grad / (new.sqrt() + EPS)
    read = (grad != 0).any(-1, keepdim=True)
    return torch.where(read, moved, p), torch.where(read, new, squares)


def touched(grad: Tensor) -> tuple[Tensor, Tensor]:
    """The rows of a table's gradient that are not zero: their numbers [R] and the rows [R, D]."""
    if grad.is_sparse:
        rows, own = grad.coalesce().indices()[0], grad.coalesce().values()
        read = (own != 0).any(-1)
        return rows[read], own[read]
    rows = (grad != 0).any(-1).nonzero()[:, 0]
    return rows, grad[rows]


def clip_(params: Sequence[Tensor], limit: float, norm: float | None = None) -> float:
    """Scale all gradients so that their norm is at most `limit` (0: no limit) and return the norm before. `norm`: theirs
    and other processes'.

    A non-finite norm leaves the gradients alone: the caller skips the step.
    """
    for p in params:
        if p.grad is not None and p.grad.is_sparse:
            p.grad = p.grad.coalesce()
    grads = [_values(local(p.grad)) for p in params if p.grad is not None]
    if norm is None:
        # In float64: a float32 sum over a table of a million values is off in its fifth digit.
        norm = float(torch.stack([torch.linalg.vector_norm(g, dtype=torch.float64) for g in grads]).norm())
    if math.isfinite(norm) and 0 < limit < norm:
        torch._foreach_mul_(grads, limit / (norm + 1e-6))
    return norm


# On each element: moments, roots, decay, update; Muon's rows evened.
ADAMW_OPERATIONS, MUON_OPERATIONS, TABLE_OPERATIONS = 14, 19, 8


def flops(optimizer: Optimizer, tokens: int) -> float:
    """FLOPs of one update over all processes, from a batch of `tokens`, each of which reads a row of each table: Muon's
    products, and what a rule does to each element."""
    operations = {"muon": MUON_OPERATIONS, "adamw": ADAMW_OPERATIONS, "table": TABLE_OPERATIONS}
    total = 0.0
    for group in optimizer.groups:
        for member in group.members:
            shape = optimizer.layout.of(member.name, tuple(member.param.shape)).shape
            rows = min(shape[0], tokens) if group.rule == "table" else shape[0]
            total += rows * math.prod(shape[1:]) * operations[group.rule]
            if group.rule == "muon":
                *batch, rows, columns = _matrices(member.name, torch.empty(shape, device="meta")).shape
                total += muon.flops(math.prod(batch), rows, columns)
    return total


def _matrices(name: str, p: Tensor) -> Tensor:
    """A parameter as [..., rows, columns]: the fused gate and up projections of experts are two matrices each."""
    return p.view(2 * p.shape[0], -1, p.shape[2]) if name.endswith("experts.gate_up_proj") else p


def _grad(p: Tensor) -> Tensor:
    assert p.grad is not None
    return local(p.grad)


def _values(grad: Tensor) -> Tensor:
    """What is in a gradient: all of it, or its rows."""
    return grad.values() if grad.is_sparse else grad


def _zeros(like: Tensor) -> Tensor:
    return torch.zeros_like(like, dtype=torch.float32)
