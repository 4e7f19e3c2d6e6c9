"""Advantages and policy losses as pure functions of tensors. B rollouts of at most T completion tokens.

Sources: GRPO (arXiv 2402.03300), DAPO (2503.14476: token mean, higher upper clip), Dr. GRPO (2503.20783: no division by
length or deviation), CISPO (2506.13585: the weight is clipped, the gradient is not), GSPO (2507.18071: one ratio a
rollout). The weight between trainer and sampler is the one's probability of a token over the other's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rorqual.errors import ConfigError

Scale = Literal["none", "group", "batch"]
STD_EPS = 1e-4  # added to a deviation before it divides


@dataclass(frozen=True)
class LossConfig:
    """How a token's surrogate is formed and how the tokens of a batch are added up."""

    # dapo: mean over all tokens of the batch; grpo: mean over rollouts of their means; dr_grpo: sum over
    # rollouts x the longest completion allowed; cispo: dapo's mean of clipped weights x log-probabilities
    kind: Literal["dapo", "grpo", "dr_grpo", "cispo"] = "dapo"
    ratio: Literal["token", "sequence"] = (
        "token"  # sequence: the geometric mean over a rollout's tokens (GSPO)
    )
    clip_low: float = 0.2
    clip_high: float = 0.28
    cispo_max: float = 5.0  # the cap of CISPO's weights
    beta: float = 0.0  # weight of the divergence from the reference (k3); 0: no reference is kept
    # Of the weight between trainer and sampler: none trusts that they agree; truncate caps it; mask drops tokens above it
    correction: Literal["none", "truncate", "mask"] = "none"
    correction_max: float = 2.0

    def __post_init__(self) -> None:
        for name in ("clip_low", "clip_high", "cispo_max", "correction_max"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"loss.{name}={getattr(self, name)}: must be above 0")
        if self.clip_low >= 1:
            raise ConfigError(f"loss.clip_low={self.clip_low}: must be below 1")
        if self.beta < 0:
            raise ConfigError(f"loss.beta={self.beta}: must be 0 (off) or more")
        defaults = type(self).__dataclass_fields__
        if self.kind != "cispo" and self.cispo_max != defaults["cispo_max"].default:
            raise ConfigError(f"loss.cispo_max={self.cispo_max}: is for cispo; loss.kind is {self.kind!r}")
        if self.kind == "cispo":
            for name in ("clip_low", "clip_high"):
                if getattr(self, name) != defaults[name].default:
                    raise ConfigError(
                        f"loss.{name}={getattr(self, name)}: loss.kind='cispo' clips at cispo_max only"
                    )
        if self.correction == "none" and self.correction_max != defaults["correction_max"].default:
            raise ConfigError(f"loss.correction_max={self.correction_max}: needs loss.correction")


@dataclass(frozen=True)
class Totals:
    """What a batch is divided by, over all its micro-batches and whatever the order: tokens that count, rollouts that
    have any, and the longest completion allowed."""

    tokens: float
    rollouts: float
    longest: int

    @classmethod
    def of(cls, mask: Tensor, longest: int) -> Totals:
        """mask [B, T]: 1 where a token counts."""
        return cls(float(mask.sum()), float((mask.sum(1) > 0).sum()), longest)


@dataclass(frozen=True)
class PolicyLoss:
    """`total` is differentiable; the rest are sums over tokens that count, for figures."""

    total: Tensor
    clipped: Tensor  # tokens whose surrogate the clip holds
    divergence: Tensor  # k3 from the reference
    dropped: Tensor  # tokens that the correction masks


def advantages(rewards: Tensor, scored: Tensor | None = None, scale: Scale = "none") -> Tensor:
    """rewards [G, K] of G groups, scored [G, K] true where the grader gave a verdict → [G, K]: the reward minus its
    group's mean, divided by the deviation of the group or the batch where asked. What was not scored is out of every
    statistic and gets 0."""
    known = torch.ones_like(rewards, dtype=torch.bool) if scored is None else scored
    missing = rewards.masked_fill(~known, float("nan"))
    centred = missing - missing.nanmean(1, keepdim=True)
    if scale == "group":
        centred = centred / (_deviation(missing, 1) + STD_EPS)
    elif scale == "batch":
        centred = centred / (_deviation(missing.flatten()[None], 1) + STD_EPS)
    return centred.nan_to_num(0.0)


def counting(mask: Tensor, truncated: Tensor, keep_truncated: bool = False) -> Tensor:
    """mask [B, T] of completion tokens, truncated [B] → the mask with rollouts that ran into their limit left out: they
    neither teach nor stand in a denominator."""
    return mask if keep_truncated else mask * (~truncated)[:, None].to(mask.dtype)


def log_ratio(new: Tensor, old: Tensor, mask: Tensor, level: Literal["token", "sequence"]) -> Tensor:
    """new, old [B, T] log-probabilities → [B, T], or [B, 1] the mean over a rollout's tokens."""
    difference = (new - old) * mask
    if level == "token":
        return difference
    return difference.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)


def k3(new: Tensor, reference: Tensor) -> Tensor:
    """The unbiased, never negative estimate of KL(new | reference) from samples of new
    (http://joschu.net/blog/kl-approx.html)."""
    difference = reference - new
    return difference.exp() - difference - 1


def correction(trainer: Tensor, sampler: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Log-probabilities [B, T] under the trainer and under the sampler, of the same weights → (weight of each token, 1
    where it is kept)."""
    weight = (trainer - sampler).exp()
    kept = torch.ones_like(weight)
    if config.correction == "truncate":
        weight = weight.clamp(max=config.correction_max)
    elif config.correction == "mask":
        kept = (weight <= config.correction_max).to(weight.dtype)
        weight = weight * kept
    else:
        weight = kept
    return weight, kept


def policy_loss(
    new: Tensor,
    old: Tensor,
    mask: Tensor,
    advantage: Tensor,
    totals: Totals,
    config: LossConfig,
    reference: Tensor | None = None,
    weight: Tensor | None = None,
) -> PolicyLoss:
    """A micro-batch's part of the loss.

    new, old, reference [B, T]: log-probabilities of the completion's tokens now, when the update began, and under the
    reference; mask [B, T]; advantage [B]; weight [B, T] of `correction`. Summed over micro-batches with the totals of
    the whole batch, the loss does not depend on how the batch was cut.
    """
    advantage = advantage[:, None]
    ratio = log_ratio(new, old, mask, config.ratio).exp()
    if config.kind == "cispo":
        held = ratio.detach() > config.cispo_max
        surrogate = -ratio.detach().clamp(max=config.cispo_max) * advantage * new
    else:
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        surrogate = -torch.min(ratio * advantage, clipped * advantage)
        held = (clipped * advantage < ratio * advantage).detach()
    if weight is not None:
        surrogate = surrogate * weight
    divergence = torch.zeros((), dtype=new.dtype, device=new.device)
    if config.beta and reference is not None:
        each = k3(new, reference)
        surrogate = surrogate + config.beta * each
        divergence = (each.detach() * mask).sum()
    dropped = torch.zeros_like(divergence) if weight is None else ((weight == 0) * mask).sum()
    return PolicyLoss(
        aggregate(surrogate, mask, totals, config.kind),
        (held * mask).sum(),
        divergence,
        dropped,
    )


def aggregate(each: Tensor, mask: Tensor, totals: Totals, kind: str) -> Tensor:
    """Losses of tokens [B, T] (or [B, 1]) → a scalar. Nothing that counts gives 0, not a division by 0."""
    summed = (each * mask).sum(1)
    if kind == "grpo":
        return (summed / mask.sum(1).clamp(min=1)).sum() / max(totals.rollouts, 1.0)
    if kind == "dr_grpo":
        return summed.sum() / max(totals.rollouts * totals.longest, 1.0)
    return summed.sum() / max(totals.tokens, 1.0)


def _deviation(x: Tensor, dim: int) -> Tensor:
    """Sample deviation along a dimension without the missing; 0 where there are fewer than two."""
    known = ~x.isnan()
    count = known.sum(dim, keepdim=True)
    square = (x - x.nanmean(dim, keepdim=True)).square().nansum(dim, keepdim=True)
    return (square / (count - 1).clamp(min=1)).sqrt()
