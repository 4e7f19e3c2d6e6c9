"""Sampled softmax: a loss over some of the vocabulary's tokens, whose head products are most of a small model's work.

All tokens that a batch predicts are candidates, and so is a random sample of the others, which stands for all of them: of
n others m are drawn, and the exponential of each counts n/m times, so the sum over the vocabulary is right on average
(after Jean et al., arXiv 1412.2007, with the batch's own targets). The logarithm of that sum errs a little to the low
side; held-out losses are of the whole vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log
from typing import Any

import torch
from torch import Tensor

LEAST = 8  # of the tokens that a batch does not predict, at least one in so many is a candidate


@dataclass(frozen=True)
class Candidates:
    """ids [S], ascending; places [V] of each in them, -1 where a token is none; biases [S] that are added to their
    logits: the logarithm of how many tokens each stands for."""

    ids: Tensor
    places: Tensor
    biases: Tensor

    @classmethod
    def draw(cls, targets: Tensor, vocab_size: int, share: float, seed: int) -> Candidates:
        """For targets [*L], `share` of the vocabulary, or more where that is too little for what they are."""
        wanted = torch.zeros(vocab_size, dtype=torch.bool, device=targets.device)
        wanted[targets.flatten()] = True
        others = (~wanted).nonzero()[:, 0]
        own = vocab_size - len(others)
        count = min(len(others), max(round(share * vocab_size) - own, ceil(len(others) / LEAST)))
        order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
        sample = others[order[:count].to(others.device)]
        biases = torch.zeros(vocab_size, device=targets.device)
        if count:
            biases[sample] = log(len(others) / count)
        wanted[sample] = True
        ids = wanted.nonzero()[:, 0]
        places = torch.full((vocab_size,), -1, device=targets.device)
        places[ids] = torch.arange(len(ids), device=targets.device)
        return cls(ids, places, biases[ids])


def share_of(line: Mapping[str, Any], vocab_size: int) -> float:
    """Of the vocabulary, that the losses up to a line of metrics were over: a batch of many different tokens needs more
    than the share that was asked for. 1 without sampling."""
    return line["logits"] / (line["tokens"] * vocab_size) if "logits" in line else 1.0
