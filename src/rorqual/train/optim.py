"""Muon for matrices, AdamW for embeddings, head, routers and vectors. One step, one state, saved by name.

Muon (Jordan et al., 2024; arXiv 2502.16982): the momentum of a matrix, made orthogonal, is its update. Here with the
Polar Express coefficients (arXiv 2505.16932), rows evened by their second moments (NorMuon, arXiv 2510.05491), the
update scaled by 0.2 sqrt(max(rows, columns)) to AdamW's size, and weight decay only where it agrees with the update.
Matrices of one shape, and all experts of a layer, are made orthogonal in one batched product.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.errors import RunError
from rorqual.train.config import Optim

POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
MOMENTUM_WARMUP = 300  # steps over which the momentum rises from 0.85
ROW_BETA = 0.95


def orthogonal(g: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest semi-orthogonal matrices to g [B, R, C], by five steps of an odd polynomial."""
    x = g.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * 1.01 + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for a, b, c in POLAR_EXPRESS:
        s = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(g.dtype)


def kind(name: str, p: Tensor) -> str:
    """Which rule a parameter follows: matrix, embedding, head or vector."""
    if name.startswith(("embed_tokens", "ngram.weight")) or (
        name.startswith("value_embeddings") and ".gate." not in name
    ):
        return "embedding"
    if name.startswith("lm_head"):
        return "head"
    small = p.dim() < 2 or min(p.shape[-2:]) == 1 or "router" in name or name == "x0_mix"
    return "vector" if small else "matrix"


@dataclass
class Group:
    """Parameters that share a rule and a full rate."""

    names: list[str]
    params: list[Tensor]
    lr: float
    decay: float


class Optimizer:
    """`step(share)` applies one update at a share of the full rates. State is float32 and known by parameter name."""

    def __init__(
        self, named: Iterable[tuple[str, Tensor]], config: Optim, dtype: torch.dtype = torch.float32
    ) -> None:
        self.config, self.dtype = config, dtype
        rates = {
            "matrix": config.matrix_lr,
            "embedding": config.embedding_lr,
            "head": config.head_lr,
            "vector": config.vector_lr,
        }
        muon = config.name == "muon"
        self.matrices: list[Group] = []
        self.rest: list[Group] = []
        by_shape: dict[tuple[int, ...], list[tuple[str, Tensor]]] = defaultdict(list)
        by_kind: dict[str, list[tuple[str, Tensor]]] = defaultdict(list)
        for name, p in named:
            if not p.requires_grad:
                continue
            which = kind(name, p)
            if which == "matrix" and muon:
                by_shape[tuple(p.shape)].append((name, p))
            else:
                by_kind[which].append((name, p))
        for members in by_shape.values():
            self.matrices.append(_group(members, rates["matrix"], config.weight_decay))
        for which, members in by_kind.items():
            # under Muon the tables and the head are not decayed; AdamW alone decays all but vectors
            decay = 0.0 if muon or which == "vector" else config.weight_decay
            self.rest.append(_group(members, rates[which], decay))
        self.state: dict[str, Tensor] = {}
        self.count = 0

    @torch.no_grad()
    def step(self, share: float) -> None:
        """One update of every parameter that has a gradient."""
        self.count += 1
        for group in self.matrices:
            self._muon(group, share)
        for group in self.rest:
            self._adamw(group, share)

    def state_dict(self) -> dict[str, Tensor]:
        """Every moment by parameter name, and the number of updates."""
        return {**self.state, "count": torch.tensor(self.count)}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take saved moments; raises RunError where they are not this model's."""
        own = {f"{n}.{m}" for g in self.matrices for n in g.names for m in ("momentum", "rows")}
        own |= {f"{n}.{m}" for g in self.rest for n in g.names for m in ("first", "second")}
        given = set(state) - {"count"}
        if self._started(state) and given != own:
            wrong = sorted(given ^ own)
            raise RunError(
                f"optimizer state does not fit the model: {wrong[0]} and {len(wrong) - 1} more differ"
            )
        self.count = int(state["count"])
        self.state = {k: v.clone() for k, v in state.items() if k != "count"}

    @staticmethod
    def _started(state: Mapping[str, Tensor]) -> bool:
        return int(state["count"]) > 0

    def _moment(self, name: str, like: Tensor) -> Tensor:
        if name not in self.state:
            self.state[name] = torch.zeros_like(like, dtype=torch.float32)
        return self.state[name]

    def _muon(self, group: Group, share: float) -> None:
        momentum = self.config.momentum
        warm = min(self.count / MOMENTUM_WARMUP, 1.0)
        momentum = 0.85 + (momentum - 0.85) * warm if momentum > 0.85 else momentum
        live = [(n, p) for n, p in zip(group.names, group.params, strict=True) if p.grad is not None]
        if not live:
            return
        updates = []
        for name, p in live:
            m = self._moment(f"{name}.momentum", p)
            assert p.grad is not None
            m.lerp_(p.grad, 1 - momentum)
            updates.append(p.grad.lerp(m, momentum))  # Nesterov's look ahead
        shape = live[0][1].shape
        flat = torch.stack(updates).reshape(-1, *shape[-2:])
        o = orthogonal(flat, self.dtype).view(len(live), *shape)
        scale = 0.2 * math.sqrt(max(shape[-2:])) * group.lr * share
        for (name, p), update in zip(live, o, strict=True):
            rows = self._moment(f"{name}.rows", p[..., :1])
            rows.lerp_(update.square().mean(-1, keepdim=True), 1 - ROW_BETA)
            evened = update / (rows.sqrt() + 1e-8)
            evened *= update.norm(dim=(-2, -1), keepdim=True) / (
                evened.norm(dim=(-2, -1), keepdim=True) + 1e-8
            )
            if group.decay:
                p.sub_(p * (p * evened > 0), alpha=group.lr * share * group.decay)
            p.sub_(evened, alpha=scale)

    def _adamw(self, group: Group, share: float) -> None:
        b1, b2 = self.config.betas
        lr = group.lr * share
        live = [(n, p) for n, p in zip(group.names, group.params, strict=True) if p.grad is not None]
        if not live:
            return
        params = [p for _, p in live]
        grads = [p.grad.float() for p in params if p.grad is not None]
        first = [self._moment(f"{n}.first", p) for n, p in live]
        second = [self._moment(f"{n}.second", p) for n, p in live]
        if group.decay:
            torch._foreach_mul_(params, 1 - lr * group.decay)
        torch._foreach_lerp_(first, grads, 1 - b1)
        torch._foreach_mul_(second, b2)
        torch._foreach_addcmul_(second, grads, grads, 1 - b2)
        root = torch._foreach_sqrt(second)
        torch._foreach_div_(root, math.sqrt(1 - b2**self.count))
        torch._foreach_add_(root, 1e-8)
        torch._foreach_addcdiv_(params, first, root, -lr / (1 - b1**self.count))


def _group(members: list[tuple[str, Tensor]], lr: float, decay: float) -> Group:
    return Group([n for n, _ in members], [p for _, p in members], lr, decay)


def clip_(params: Iterable[Tensor], limit: float) -> float:
    """Scale all gradients so that their norm is at most `limit` (0: no limit) and return the norm before.

    A non-finite norm leaves the gradients alone: the caller skips the step.
    """
    grads = [p.grad for p in params if p.grad is not None]
    norm = float(torch.stack(torch._foreach_norm(grads)).norm())
    if math.isfinite(norm) and 0 < limit < norm:
        torch._foreach_mul_(grads, limit / (norm + 1e-6))
    return norm


def flops(optimizer: Optimizer) -> float:
    """FLOPs of one step's orthogonalisation."""
    total = 0.0
    for group in optimizer.matrices:
        for p in group.params:
            r, c = sorted(p.shape[-2:])
            batch = p.numel() // (r * c)
            total += batch * len(POLAR_EXPRESS) * (2 * r * r * c * 2 + 2 * r**3)
    return total
