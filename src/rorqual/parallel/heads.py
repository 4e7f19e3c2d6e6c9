"""Tensor parallelism for attention: each process of a team computes some of the heads, on the same rows as its
neighbours. The feed-forward parts are not divided: each process takes some of the tokens through them, and the team
shares what comes out. Hooks do it, so that the model's own code and names stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rorqual.model.gqa import GQA
from rorqual.model.mla import MLA
from rorqual.model.moe import Experts, MoE
from rorqual.model.transformer import Transformer
from rorqual.parallel.layout import Layout, cut_
from rorqual.parallel.mesh import Team


def divide_heads(model: Transformer, layout: Layout) -> None:
    """Keep this process's heads of every attention, and put the exchange around attention and feed-forward parts."""
    team = layout.team("tensor")
    for path, module in list(model.named_modules()):
        if isinstance(module, MLA | GQA):
            for name, _ in list(module.named_parameters()):
                owner, _, leaf = name.rpartition(".")
                placement = layout.of(f"{path}.{name}")
                if placement.splits:
                    cut_(module.get_submodule(owner), leaf, placement.piece(layout.mesh))
            _surround_attention(module, team)
        elif isinstance(module, MoE):
            _surround(module.experts, team)
            if module.shared_experts is not None:
                _surround(module.shared_experts, team)
        elif path.endswith("mlp"):
            _surround(module, team)


def _surround_attention(attn: MLA | GQA, team: Team) -> None:
    attn.num_heads //= team.size
    width = None
    if isinstance(attn, GQA):
        attn.num_key_value_heads //= team.size
        width = attn.num_key_value_heads * attn.head_dim

    def enter(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x, cos, sin, attend, value = given
        if value is not None:
            value = _SumBackward.apply(value, team)
            value = value if width is None else value.narrow(-1, team.index * width, width)
        return _SumBackward.apply(x, team), cos, sin, attend, value

    attn.register_forward_pre_hook(enter)
    attn.o_proj.register_forward_hook(lambda _, __, out: _SumForward.apply(out, team))


def _surround(module: nn.Module, team: Team) -> None:
    """Some of the tokens in, all of the results out."""
    shapes: list[torch.Size] = []

    def enter(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
        x, *more = given
        shapes.append(x.shape)
        mine = _Take.apply(x.flatten(0, -2), team)
        if not isinstance(module, Experts):
            return (mine,)
        ids, weights, load = more
        ids = _part(ids, team)
        counts = torch.bincount(ids.flatten(), minlength=len(load))
        return mine, ids, _Take.apply(weights, team), counts

    def leave(_: nn.Module, __: Any, out: Tensor) -> Tensor:
        shape = shapes.pop()
        whole: Tensor = _Share.apply(out, team, shape[:-1].numel())
        return whole.view(shape)

    module.register_forward_pre_hook(enter)
    module.register_forward_hook(leave)


class _SumBackward(torch.autograd.Function):
    """The same values in; gradients from every process's heads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        ctx.team = team
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.team.sum_(grad.contiguous().clone()), None


class _SumForward(torch.autograd.Function):
    """What all heads give together; its gradient is the same for each."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        return team.sum_(x.contiguous().clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


class _Take(torch.autograd.Function):
    """x [N, D] → this process's rows, filled up with zeros where N does not divide."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team) -> Tensor:
        ctx.team, ctx.rows = team, len(x)
        return _part(x, team)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _joined(grad, ctx.team, ctx.rows), None


class _Share(torch.autograd.Function):
    """This process's rows → those of all [N, D]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, team: Team, rows: int) -> Tensor:
        ctx.team = team
        return _joined(x, team, rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _part(grad, ctx.team), None, None


def _part(x: Tensor, team: Team) -> Tensor:
    each = -(-len(x) // team.size)
    mine = x[team.index * each : (team.index + 1) * each]
    missing = each - len(mine)
    return mine.contiguous() if not missing else torch.cat((mine, x.new_zeros(missing, *x.shape[1:])))


def _joined(x: Tensor, team: Team, rows: int) -> Tensor:
    return team.gather(x).flatten(0, 1)[:rows]
