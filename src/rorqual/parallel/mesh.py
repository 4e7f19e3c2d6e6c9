"""The processes of a run and the teams that they form. Alone, every collective is nothing.

Ranks with the same rank // tensor work on the same rows and share attention heads (`tensor`); those with the same
rank % tensor hold the same weights and take different rows (`data`). Ranks with the same rank // expert share the
experts (`expert`); those with the same rank % expert hold the same ones (`copies`).
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rorqual.parallel.config import Parallel
from rorqual.parallel.environment import world_of

T = TypeVar("T")
Kind = Literal["world", "data", "tensor", "expert", "copies"]
KINDS: tuple[Kind, ...] = ("world", "data", "tensor", "expert", "copies")


@dataclass(frozen=True)
class Team:
    """Processes that talk with each other, as one of them sees it; of size 1 it talks with nobody."""

    ranks: tuple[int, ...]
    index: int  # this process's place among them
    group: Any = None  # of torch.distributed

    @property
    def size(self) -> int:
        return len(self.ranks)

    def sum_(self, t: Tensor) -> Tensor:
        """Replace t by its sum over the team, the same bits on every process."""
        if self.size > 1:
            dist.all_reduce(t, group=self.group)
        return t

    def gather(self, t: Tensor) -> Tensor:
        """t [*L] → [size, *L], in the team's order."""
        out = t.new_empty(self.size, *t.shape)
        if self.size > 1:
            dist.all_gather_single(out.view(-1), t.contiguous().view(-1), group=self.group)
        else:
            out[0] = t
        return out


class Mesh:
    """All teams of this process."""

    def __init__(
        self, rank: int = 0, world: int = 1, tensor: int = 1, expert: int = 1, timeout: float = 300.0
    ) -> None:
        self.rank, self.world, self.tensor, self.expert = rank, world, tensor, expert
        self.teams: dict[Kind, Team] = {kind: self._team(kind, timeout) for kind in KINDS}

    @property
    def first(self) -> bool:
        """Whether this process speaks for all: it writes logs and reports."""
        return self.rank == 0

    @property
    def data(self) -> Team:
        return self.teams["data"]

    def index(self, kind: Kind, rank: int) -> int:
        """A rank's place in its team."""
        return {
            "world": rank, "data": rank // self.tensor, "tensor": rank % self.tensor,
            "expert": rank % self.expert, "copies": rank // self.expert,
        }[kind]  # fmt: skip

    def number(self, kind: Kind, rank: int) -> int:
        """Which of the teams of a kind a rank is in."""
        return {
            "world": 0, "data": rank % self.tensor, "tensor": rank // self.tensor,
            "expert": rank // self.expert, "copies": rank % self.expert,
        }[kind]  # fmt: skip

    def most(self, value: int) -> int:
        """The largest of all processes' values: a wish of one is a wish of all."""
        if self.world == 1:
            return value
        t = torch.tensor(value, device=_device())
        dist.all_reduce(t, op=dist.ReduceOp.MAX)
        return int(t)

    def told(self, value: int) -> int:
        """The first process's value."""
        return self.most(value if self.first else -(2**62))

    def together(self, work: Callable[[], T], alone: bool = False) -> T | None:
        """Every process works (`alone`: the first one, for all). Where one fails, all do: it with its own error, the
        others with PeerFailed."""
        problem: Exception | None = None
        result = None
        if self.first or not alone:
            try:
                result = work()
            except Exception as e:
                problem = e
        failed = self.most(int(problem is not None))
        if problem is not None:
            raise problem
        if failed:
            raise PeerFailed("another process could not go on, and has said why")
        return result

    def _team(self, kind: Kind, timeout: float) -> Team:
        mine: Team | None = None
        for number in range(self.world):
            ranks = tuple(r for r in range(self.world) if self.number(kind, r) == number)
            if not ranks:
                break
            group = None
            if 1 < len(ranks) < self.world:  # every process makes every team's group, in one order
                group = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout))
            if self.rank in ranks:
                mine = Team(ranks, ranks.index(self.rank), group)
        assert mine is not None
        return mine


class PeerFailed(RuntimeError):
    """Another process failed and has said why."""


def start(parallel: Parallel, device: torch.device) -> Mesh:
    """Join the other processes, if there are any."""
    rank, world = world_of()
    if world > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(seconds=parallel.timeout))
    return Mesh(rank, world, parallel.tensor, parallel.expert, parallel.timeout)


def lost_the_others(e: RuntimeError) -> bool:
    """Whether an error is that of an exchange with processes that are gone or too slow."""
    return isinstance(e, PeerFailed) or any(word in str(e) for word in ("gloo", "NCCL", "Timed out"))


def leave() -> None:
    """Part from the others."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _device() -> torch.device:
    return torch.device("cuda" if dist.get_backend() == "nccl" else "cpu")
