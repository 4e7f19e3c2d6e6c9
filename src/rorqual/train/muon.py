"""Muon: the momentum of a matrix, made orthogonal, is its update (Jordan et al., 2024; arXiv 2502.16982).

Orthogonalised with the Polar Express coefficients (arXiv 2505.16932), rows evened by their second moments (NorMuon,
arXiv 2510.05491), scaled by 0.2 sqrt(max(rows, columns)) to the size of AdamW's updates, with weight decay only where
it agrees with the update (cautious: arXiv 2411.16085). Matrices of one shape, all experts among them, go through one
batched product.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
# Each step but the last is taken as if singular values were this much larger: in bfloat16 they overshoot 1 by rounding,
# and beyond 1 these polynomials grow (up to 14,000 on matrices of 16 x 32; with 1.01 or more none above 1.15).
SAFETY = 1.02
ROW_BETA = 0.95
STEPS = (*((a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in POLAR_EXPRESS[:-1]), POLAR_EXPRESS[-1])


def orthogonal(g: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """The nearest semi-orthogonal matrices to g [B, R, C], in `dtype`, by five steps of an odd polynomial.

    Nearly: singular values above a hundredth of the largest come out between 0.8 and 1.2.
    """
    x = g.to(dtype)
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * SAFETY + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).contiguous()
    for a, b, c in STEPS:
        s = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(s, s, s, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def flops(batch: int, rows: int, columns: int) -> float:
    """FLOPs of `orthogonal` for a batch of matrices."""
    r, c = sorted((rows, columns))
    return batch * len(POLAR_EXPRESS) * (2 * r * r * c * 2 + 2 * r**3)


@dataclass(frozen=True)
class Rates:
    """One step's settings: `lr` already follows the schedule, `momentum` its own warm-up."""

    lr: float
    momentum: float
    decay: float
    even_rows: bool
    dtype: torch.dtype  # of the orthogonalisation's products


class Work:
    """One process has all of every matrix, and does all the work."""

    together = False  # whether a process that has nothing of a matrix takes part all the same

    def whole(self, parts: list[Tensor]) -> Tensor:
        """What this process has of n parameters → all of them [n, ..., R, C]."""
        return torch.stack(parts)

    def orthogonal(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """x [B, R, C] → `orthogonal` of it."""
        return orthogonal(x, dtype)

    def mine(self, updates: Tensor) -> Tensor:
        """The part [n, ...] of the updates [n, ..., R, C] that is this process's."""
        return updates


WORK = Work()


def muon_(
    params: list[Tensor],
    grads: list[Tensor],
    momenta: list[Tensor],
    rows: list[Tensor],
    r: Rates,
    by: Work = WORK,
) -> None:
    """One update in place of matrices [..., R, C] of one shape; rows [..., R, 1] are their second moments. `by`: how
    several processes share them."""
    torch._foreach_lerp_(momenta, grads, 1 - r.momentum)
    ahead = by.whole(list(torch._foreach_lerp(grads, momenta, r.momentum)))  # Nesterov's look ahead
    shape = ahead.shape[1:]
    update = by.orthogonal(ahead.view(-1, *shape[-2:]), r.dtype).float()
    if r.even_rows:
        update = update * _even_rows_(rows, update.square().mean(-1, keepdim=True))
    updates = by.mine(update.view(len(params), *shape)).unbind(0)
    if r.decay:
        for p, u in zip(params, updates, strict=True):
            p.addcmul_(p, p * u > 0, value=-r.lr * r.decay)
    torch._foreach_add_(params, updates, alpha=-0.2 * math.sqrt(max(shape[-2:])) * r.lr)


def _even_rows_(rows: list[Tensor], square: Tensor) -> Tensor:
    """Take the rows' mean squares [B, R, 1] into their moments; → factors [B, R, 1] that even the rows out and leave
    each matrix its norm."""
    stacked = square.view(len(rows), *rows[0].shape)
    torch._foreach_lerp_(rows, stacked.unbind(0), 1 - ROW_BETA)
    factor = torch.stack(list(rows)).view_as(square).sqrt().add_(1e-8).reciprocal_()
    norm = square.sum(-2, keepdim=True) / (square * factor.square()).sum(-2, keepdim=True).clamp(min=1e-30)
    return factor * norm.sqrt()


def muon_reference(
    p: Tensor, grad: Tensor, momentum: Tensor, rows: Tensor, r: Rates
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition for one matrix [R, C]: the new matrix, momentum and row moments."""
    momentum = r.momentum * momentum + (1 - r.momentum) * grad
    update = orthogonal(((1 - r.momentum) * grad + r.momentum * momentum)[None], r.dtype)[0].float()
    if r.even_rows:
        rows = ROW_BETA * rows + (1 - ROW_BETA) * update.square().mean(1, keepdim=True)
        evened = update / (rows.sqrt() + 1e-8)
        update = evened * update.norm() / evened.norm()
    decayed = p - r.lr * r.decay * p * (p * update > 0)
    return decayed - 0.2 * math.sqrt(max(p.shape)) * r.lr * update, momentum, rows
