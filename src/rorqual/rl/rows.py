"""Rollouts as rows of tokens in which a prompt stands once for several of its completions.

A row is a prompt and then completions, each of which sees the prompt and itself: of 16 answers of 9 tokens to a prompt of
10, 154 tokens are computed instead of 304.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.model.attend import Causal, Tree
from rorqual.rl.rollout import Rollout

LONGEST = 192  # tokens of a row that is shared: beyond, attention costs more than the prompts that it saves
PAD = 4  # rows are padded to a multiple: grouped products want 16 bytes


@dataclass(frozen=True)
class Row:
    """Numbers of rollouts that share a prompt, and the tokens that they need: the last of each is only a target."""

    numbers: tuple[int, ...]
    length: int


def lay_out(rollouts: Sequence[Rollout]) -> list[Row]:
    """Every rollout in one row; the shortest rows first."""
    by_prompt: dict[tuple[int, ...], list[int]] = {}
    for i, r in enumerate(rollouts):
        by_prompt.setdefault(tuple(r.prompt_ids), []).append(i)
    rows = []
    for prompt, numbers in by_prompt.items():
        held: list[int] = []
        length = len(prompt)
        for i in sorted(numbers, key=lambda i: len(rollouts[i].ids)):
            more = len(rollouts[i].ids) - 1
            if held and length + more > LONGEST:
                rows.append(Row(tuple(held), length))
                held, length = [], len(prompt)
            held.append(i)
            length += more
        rows.append(Row(tuple(held), length))
    return sorted(rows, key=lambda r: r.length)


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens with R rollouts of at most C completion tokens.

    ids, positions, branch [B, T]: a token is of the prompt (0), of the row's completion number 1, 2, …, or padding (-1);
    previous [B, T]: the place in the row of the token before. experts [B, T, layers, K]. Of completions [R, C]: targets,
    source (the place in B x T whose hidden state predicts it), mask, and log-probabilities when sampled, under the
    trainer then, and under the reference. advantage, truncated [R].
    """

    ids: Tensor
    positions: Tensor
    branch: Tensor
    previous: Tensor
    experts: Tensor | None
    targets: Tensor
    source: Tensor
    mask: Tensor
    sampled: Tensor
    trained: Tensor | None
    reference: Tensor | None
    advantage: Tensor
    truncated: Tensor

    @classmethod
    def of(
        cls, rollouts: Sequence[Rollout], advantage: Sequence[float], rows: Sequence[Row] | None = None
    ) -> Batch:
        """The rollouts of `rows`, in their order."""
        rows = lay_out(rollouts) if rows is None else rows
        length = -(-max(r.length for r in rows) // PAD) * PAD
        chosen = [rollouts[i] for row in rows for i in row.numbers]
        grid = len(chosen), max(len(r.ids) for r in chosen)
        ids = torch.zeros(len(rows), length, dtype=torch.long)
        positions, previous = torch.zeros_like(ids), torch.arange(length).repeat(len(rows), 1)
        branch = torch.full_like(ids, -1)
        experts = None
        if chosen[0].experts is not None:
            experts = torch.zeros(len(rows), length, *chosen[0].experts.shape[1:], dtype=torch.long)
        targets, source, mask = torch.zeros(grid).long(), torch.zeros(grid).long(), torch.zeros(grid)
        at = 0
        for b, row in enumerate(rows):
            prompt = len(rollouts[row.numbers[0]].prompt_ids)
            place = prompt
            ids[b, :prompt] = torch.tensor(rollouts[row.numbers[0]].prompt_ids)
            positions[b, :prompt] = torch.arange(prompt)
            previous[b, 1:prompt] = torch.arange(prompt - 1)
            branch[b, :prompt] = 0
            for k, number in enumerate(row.numbers, 1):
                r = rollouts[number]
                count = len(r.ids)
                span = slice(place, place + count - 1)
                ids[b, span] = torch.tensor(r.ids[:-1], dtype=torch.long)
                positions[b, span] = torch.arange(prompt, prompt + count - 1)
                branch[b, span] = k
                before = torch.tensor([prompt - 1, *range(place, place + count - 1)])
                previous[b, span] = before[:-1]
                targets[at, :count] = torch.tensor(r.ids)
                source[at, :count] = before + b * length
                mask[at, :count] = 1
                if experts is not None and r.experts is not None:
                    experts[b, :prompt] = r.experts[:prompt]
                    experts[b, span] = r.experts[prompt:]
                place, at = place + count - 1, at + 1
        counts = mask.bool()
        return cls(
            ids, positions, branch, previous, experts, targets, source, mask,
            _grid([r.logprobs for r in chosen], counts),
            _optional([r.trained for r in chosen], counts),
            _optional([r.reference for r in chosen], counts),
            torch.tensor([advantage[i] for row in rows for i in row.numbers]),
            torch.tensor([r.truncated for r in chosen]),
        )  # fmt: skip

    def attend(self) -> Causal:
        """Plain causal attention where every row is one rollout, else that of a tree."""
        return Tree(self.branch, self.previous) if int(self.branch.max()) > 1 else Causal()


def _grid(values: Sequence[Sequence[float]], counts: Tensor) -> Tensor:
    flat = torch.tensor([v for row in values for v in row])
    return torch.zeros(counts.shape).masked_scatter(counts, flat)


def _optional(values: Sequence[Sequence[float] | None], counts: Tensor) -> Tensor | None:
    there = [v for v in values if v is not None]
    return _grid(there, counts) if len(there) == len(values) else None
