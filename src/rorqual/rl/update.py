"""The update: log-probabilities of what was sampled, with the experts that sampling chose, and their gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rorqual.errors import ConfigError
from rorqual.model.attend import Causal
from rorqual.model.moe import Routing
from rorqual.model.transformer import Transformer
from rorqual.rl.config import RLConfig
from rorqual.rl.losses import Totals, correction, counting, k3, policy_loss
from rorqual.rl.rollout import Rollout, as_replay, expert_layers
from rorqual.train.optim import Optimizer, clip_

PAD = 4  # rows are padded to a multiple: grouped products want 16 bytes, 8 numbers in bfloat16

Autocast = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True)
class Batch:
    """Rollouts as rows. ids [B, T + 1]; the rest [B, T] over the targets ids[:, 1:]: which the completion has, their
    log-probabilities when sampled, under the trainer then, and under the reference; advantage and truncated [B];
    experts [B, T, layers, K]."""

    ids: Tensor
    mask: Tensor
    sampled: Tensor
    trained: Tensor | None
    reference: Tensor | None
    advantage: Tensor
    truncated: Tensor
    experts: Tensor | None

    @classmethod
    def of(cls, rollouts: Sequence[Rollout], advantage: Sequence[float]) -> Batch:
        longest = max(len(r.prompt_ids) + len(r.ids) for r in rollouts) - 1
        length = -(-longest // PAD) * PAD
        ids = torch.zeros(len(rollouts), length + 1, dtype=torch.long)
        mask = torch.zeros(len(rollouts), length)
        experts = None
        if rollouts[0].experts is not None:
            shape = rollouts[0].experts.shape[1:]
            experts = torch.zeros(len(rollouts), length, *shape, dtype=torch.long)
        for i, r in enumerate(rollouts):
            start, end = len(r.prompt_ids), len(r.prompt_ids) + len(r.ids)
            ids[i, :end] = torch.tensor([*r.prompt_ids, *r.ids])
            mask[i, start - 1 : end - 1] = 1
            if experts is not None and r.experts is not None:
                experts[i, : end - 1] = r.experts
        counts = mask.bool()
        return cls(
            ids,
            mask,
            _laid_out([r.logprobs for r in rollouts], counts),
            _optional([r.trained for r in rollouts], counts),
            _optional([r.reference for r in rollouts], counts),
            torch.tensor(advantage),
            torch.tensor([r.truncated for r in rollouts]),
            experts,
        )


def _laid_out(values: Sequence[Sequence[float]], counts: Tensor) -> Tensor:
    flat = torch.tensor([v for row in values for v in row])
    return torch.zeros(counts.shape).masked_scatter(counts, flat)


def _optional(values: Sequence[Sequence[float] | None], counts: Tensor) -> Tensor | None:
    there = [v for v in values if v is not None]
    return _laid_out(there, counts) if len(there) == len(values) else None


@dataclass
class Scores:
    """Of a batch's targets [B, T]; 0 where nothing counts. `entropy` is that of the distribution drawn from."""

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

    def add(self, other: Figures) -> None:
        """Take the sums of a further update."""
        for name in ("tokens", "clipped", "entropy", "divergence", "dropped", "mismatch", "compared"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.mismatch_most = max(self.mismatch_most, other.mismatch_most)
        self.norm = max(self.norm, other.norm)


def score(model: Transformer, batch: Batch, temperature: float, autocast: Autocast, replay: bool) -> Scores:
    """Log-probabilities of the batch under the model as it is, at the temperature of sampling."""
    inputs = batch.ids[:, :-1]
    routing = None
    if replay and batch.experts is not None:
        routing = Routing(replay=as_replay(batch.experts, expert_layers(model)))
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    with autocast():
        h = model(inputs, positions, Causal(), routing)
        counts = batch.mask.bool()
        logits = model.logits(h[counts]).float() / temperature
    distribution = logits.log_softmax(-1)
    picked = distribution.gather(1, batch.ids[:, 1:][counts][:, None])[:, 0]
    with torch.no_grad():
        entropy = -(distribution.exp() * distribution).sum(-1)
    flat = torch.zeros_like(batch.mask)
    return Scores(flat.masked_scatter(counts, picked), flat.masked_scatter(counts, entropy))


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
        batches = [
            Batch.of([rollouts[i] for i in rows], [advantage[i] for i in rows])
            for rows in self._cut(rollouts)
        ]
        masks = [counting(b.mask, b.truncated, c.keep_truncated) for b in batches]
        totals = _totals(masks, c.sampling.max_tokens)
        figures = Figures(tokens=totals.tokens)
        for batch, mask in zip(batches, masks, strict=True):
            if bool(mask.any()) or first:
                self._gradient(batch, mask, totals, figures, first)
        if totals.tokens:
            figures.norm = clip_(self.params, c.clip)
            if figures.norm == figures.norm and figures.norm != float("inf"):
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
                batch = Batch.of([rollouts[i] for i in rows], [0.0] * len(rows))
                found = self._score(model, batch).logprobs
                for i, mask, values in zip(rows, batch.mask.bool(), found, strict=True):
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

    def _cut(self, rollouts: Sequence[Rollout]) -> Iterator[list[int]]:
        """Numbers of rollouts of similar length, which padded have at most `micro_tokens` tokens together."""
        lengths = [len(r.prompt_ids) + len(r.ids) for r in rollouts]
        rows: list[int] = []
        for i in sorted(range(len(rollouts)), key=lambda i: lengths[i]):
            padded = -(-lengths[i] // PAD) * PAD
            if padded > self.config.micro_tokens:
                raise ConfigError(
                    f"micro_tokens={self.config.micro_tokens}: a rollout has {padded}; raise it"
                )
            if rows and (len(rows) + 1) * padded > self.config.micro_tokens:
                yield rows
                rows = []
            rows.append(i)
        if rows:
            yield rows


def _totals(masks: Sequence[Tensor], longest: int) -> Totals:
    parts = [Totals.of(m, longest) for m in masks]
    return Totals(sum(p.tokens for p in parts), sum(p.rollouts for p in parts), longest)
