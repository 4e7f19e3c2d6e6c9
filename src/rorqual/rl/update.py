"""The update: log-probabilities of what was sampled, with the experts that sampling chose, and their gradient."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rorqual.errors import ConfigError
from rorqual.model.moe import Routing
from rorqual.model.transformer import Transformer
from rorqual.rl.config import RLConfig
from rorqual.rl.losses import Totals, correction, counting, k3, policy_loss
from rorqual.rl.rollout import Rollout, as_replay, expert_layers
from rorqual.rl.rows import PAD, Batch, Row, lay_out
from rorqual.train.optim import Optimizer, clip_

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass
class Scores:
    """Of a batch's targets [R, C]; 0 where nothing counts. `entropy` is that of the distribution drawn from."""

    logprobs: Tensor
    entropy: Tensor


@dataclass
class Figures:
    """Sums over the tokens of an update, and the norm of its gradient."""

    tokens: float = 0.0
    clipped: float = 0.0
    entropy: float = 0.0
    divergence: float = 0.0
    dropped: float = 0.0
    mismatch: float = 0.0  # k3 between sampler and trainer
    mismatch_most: float = 0.0  # largest difference of a log-probability
    compared: float = 0.0  # tokens over which the mismatch was taken
    norm: float = 0.0  # the largest, of several updates
    skipped: bool = False  # for a gradient that is not finite

    def add(self, other: Figures) -> None:
        """Take the sums of a further update."""
        for name in ("tokens", "clipped", "entropy", "divergence", "dropped", "mismatch", "compared"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.mismatch_most = max(self.mismatch_most, other.mismatch_most)
        self.norm = max(self.norm, other.norm) if math.isfinite(other.norm) else other.norm


def score(model: Transformer, batch: Batch, temperature: float, autocast: Autocast, replay: bool) -> Scores:
    """Log-probabilities of the batch under the model as it is, at the temperature of sampling."""
    routing = None
    if replay and batch.experts is not None:
        routing = Routing(replay=as_replay(batch.experts, expert_layers(model)))
    counts = batch.mask.bool()
    with autocast():
        h = model(batch.ids, batch.positions, batch.attend(), routing).flatten(0, 1)
        logits = model.logits(h[batch.source[counts]]).float() / temperature
    distribution = logits.log_softmax(-1)
    picked = distribution.gather(1, batch.targets[counts][:, None])[:, 0]
    with torch.no_grad():
        entropy = -(distribution.exp() * distribution).sum(-1)
    flat = torch.zeros_like(batch.mask)
    return Scores(flat.masked_scatter(counts, picked), flat.masked_scatter(counts, entropy))


SIMILAR, ENOUGH = 1.25, 1024  # lengths of rows in one batch, once it has tokens enough to compute well


class Updater:
    """Policy gradients over rollouts and their advantages."""

    def __init__(
        self,
        config: RLConfig,
        model: Transformer,
        optimizer: Optimizer,
        autocast: Autocast,
        reference: Transformer | None = None,
    ) -> None:
        self.config, self.model, self.optimizer, self.autocast = config, model, optimizer, autocast
        self.params = [p for p in model.parameters() if p.requires_grad]
        self.reference = reference

    def step(
        self, rollouts: Sequence[Rollout], advantage: Sequence[float], share: float, first: bool
    ) -> Figures:
        """One update at a share of the full rate. `first`: the weights are those that sampled, so the mismatch between
        sampler and trainer can be read off."""
        c = self.config
        self.model.train()
        batches = [Batch.of(rollouts, advantage, rows) for rows in self._cut(rollouts)]
        masks = [counting(b.mask, b.truncated, c.keep_truncated) for b in batches]
        totals = _totals(masks, c.sampling.max_tokens)
        figures = Figures(tokens=totals.tokens)
        for batch, mask in zip(batches, masks, strict=True):
            if bool(mask.any()) or first:
                self._gradient(batch, mask, totals, figures, first)
        if totals.tokens:
            figures.norm = clip_(self.params, c.clip)
            figures.skipped = not math.isfinite(figures.norm)
            if not figures.skipped:
                self.optimizer.step(share)
        self.model.zero_grad(set_to_none=True)
        return figures

    @torch.no_grad()
    def prepare(self, rollouts: Sequence[Rollout]) -> None:
        """Before a step's first update: log-probabilities under the trainer and the reference, where the loss asks."""
        scorers = []
        if self.config.loss.correction != "none":
            scorers.append(("trained", self.model))
        if self.reference is not None:
            scorers.append(("reference", self.reference))
        for name, model in scorers:
            for rows in self._cut(rollouts):
                batch = Batch.of(rollouts, [0.0] * len(rollouts), rows)
                found = self._score(model, batch).logprobs
                numbers = [i for row in rows for i in row.numbers]
                for i, mask, values in zip(numbers, batch.mask.bool(), found, strict=True):
                    setattr(rollouts[i], name, values[mask].tolist())

    def _gradient(self, batch: Batch, mask: Tensor, totals: Totals, figures: Figures, first: bool) -> None:
        c = self.config
        scores = self._score(self.model, batch)
        old, weight = batch.sampled, None
        if batch.trained is not None:
            old, (weight, _) = batch.trained, correction(batch.trained, batch.sampled, c.loss)
        loss = policy_loss(
            scores.logprobs, old, mask, batch.advantage, totals, c.loss, batch.reference, weight
        )
        loss.total.backward()
        figures.clipped += float(loss.clipped)
        figures.divergence += float(loss.divergence)
        figures.dropped += float(loss.dropped)
        figures.entropy += float((scores.entropy * mask).sum())
        if first:
            new = scores.logprobs.detach()
            figures.compared += float(mask.sum())
            figures.mismatch += float((k3(batch.sampled.double(), new.double()) * mask).sum())
            most = ((new - batch.sampled).abs() * mask).max()
            figures.mismatch_most = max(figures.mismatch_most, float(most))

    def _score(self, model: Transformer, batch: Batch) -> Scores:
        c = self.config
        return score(model, batch, c.sampling.temperature, self.autocast, c.sampling.replay)

    def _cut(self, rollouts: Sequence[Rollout]) -> Iterator[list[Row]]:
        """Rows of similar length, which padded have at most `micro_tokens` tokens together."""
        held: list[Row] = []
        for row in lay_out(rollouts):
            padded = -(-row.length // PAD) * PAD
            if padded > self.config.micro_tokens:
                raise ConfigError(
                    f"micro_tokens={self.config.micro_tokens}: a rollout has {padded}; raise it"
                )
            full = held and (len(held) + 1) * padded > self.config.micro_tokens
            apart = held and padded > SIMILAR * held[0].length and len(held) * held[0].length >= ENOUGH
            if full or apart:
                yield held
                held = []
            held.append(row)
        if held:
            yield held


def _totals(masks: Sequence[Tensor], longest: int) -> Totals:
    parts = [Totals.of(m, longest) for m in masks]
    return Totals(sum(p.tokens for p in parts), sum(p.rollouts for p in parts), longest)
