"""Expert parallelism: each process holds some of the experts, and tokens travel to them and back.

A token goes once to each process that holds experts of its choice, however many there are (device-limited routing
bounds how many processes that is), and comes back as the weighted sum of what they made of it
(DeepSeek-V2, arXiv 2405.04434, section 2.1.2).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from rorqual.model.moe import Experts
from rorqual.parallel.mesh import Team


class SpreadExperts(Experts):
    """This process's part of a layer's experts; it takes the place of the whole under the same names."""

    def __init__(self, whole: Experts, team: Team) -> None:
        nn.Module.__init__(self)
        self.team = team
        self.count = whole.gate_up_proj.shape[0] // team.size
        mine = slice(team.index * self.count, (team.index + 1) * self.count)
        self.gate_up_proj = nn.Parameter(whole.gate_up_proj.detach()[mine].clone())
        self.down_proj = nn.Parameter(whole.down_proj.detach()[mine].clone())

    def forward(self, x: Tensor, ids: Tensor, weights: Tensor, load: Tensor) -> Tensor:
        """x [N, D], ids and weights [N, K] over all experts → [N, D]; every process of the team calls it together, those
        without a token too."""
        trip = _Trip(ids, self.count, self.team)
        rows = _Exchange.apply(x[trip.token], trip.sent, trip.received, self.team)
        by = _Exchange.apply(weights.flatten()[trip.order], trip.going, trip.coming, self.team)
        # One row for nobody: experts that no token chose still get gradients, of zero.
        at = torch.cat((rows, rows.new_zeros(1, rows.shape[1])))[_and(trip.row, len(rows))]
        chosen, by = _and(trip.expert, 0), torch.cat((by, by.new_zeros(1)))
        counts = torch.bincount(chosen, minlength=self.count)
        y = super().forward(at, chosen[:, None], by[:, None], counts)[:-1]
        made = torch.zeros_like(rows, dtype=torch.float32).index_add(0, trip.row, y.float())
        back = _Exchange.apply(made.to(x.dtype), trip.received, trip.sent, self.team)
        out = torch.zeros_like(x, dtype=torch.float32).index_add(0, trip.token, back.float())
        return out.to(x.dtype)


class _Trip:
    """Who goes where. Rows are tokens, sent once to a process; visits are the experts that they see there."""

    def __init__(self, ids: Tensor, count: int, team: Team) -> None:
        n, k = ids.shape
        owner = ids // count  # [N, K]
        wanted = torch.zeros(n, team.size, dtype=torch.bool, device=ids.device).scatter_(1, owner, True)
        self.token = wanted.mT.nonzero()[:, 1]  # of each row sent, by process
        self.order = owner.flatten().argsort(
            stable=True
        )  # of each visit, by process: its place in ids.flatten()
        place = wanted.cumsum(0) - 1  # [N, size]: each token's place among the rows of a process
        row = place.flatten()[self.order // k * team.size + owner.flatten()[self.order]]
        visits = torch.stack((row, ids.flatten()[self.order] % count), 1)
        ours = torch.stack((wanted.sum(0), torch.bincount(owner.flatten(), minlength=team.size)), 1)
        theirs = torch.empty_like(ours)
        dist.all_to_all_single(theirs, ours, group=team.group)
        self.sent, self.going = ours.T.tolist()
        self.received, self.coming = theirs.T.tolist()
        came = _exchange(visits, self.going, self.coming, team)
        begin = theirs[:, 0].cumsum(0) - theirs[:, 0]  # where each process's rows begin among those received
        self.row = came[:, 0] + begin.repeat_interleave(theirs[:, 1])
        self.expert = came[:, 1]


class _Exchange(torch.autograd.Function):
    """Rows to each process and from each; gradients go the other way."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], team: Team) -> Tensor:
        ctx.trip = (received, sent, team)
        return _exchange(x, sent, received, team)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad, *ctx.trip), None, None, None


def _exchange(x: Tensor, sent: list[int], received: list[int], team: Team) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=team.group)
    return out


def _and(index: Tensor, last: int) -> Tensor:
    return torch.cat((index, index.new_tensor([last])))
