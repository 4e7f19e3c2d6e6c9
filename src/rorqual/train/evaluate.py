"""How good a model is on held-out text: nats a token, and bits a byte, which compares across tokenizers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from rorqual.model.transformer import Transformer
from rorqual.text.tokenizer import Tokenizer
from rorqual.train.batch import Lesson, Rows
from rorqual.train.loss import cross_entropy


@dataclass(frozen=True)
class Heldout:
    """Sums over held-out targets."""

    nats: float
    tokens: float
    bytes: float

    @property
    def loss(self) -> float:
        """Mean nats a token."""
        return self.nats / max(self.tokens, 1)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / max(self.bytes, 1)


def byte_lengths(tokenizer: Tokenizer, vocab_size: int) -> Tensor:
    """Bytes of text behind each token id [V]; special tokens stand for none."""
    count = min(tokenizer.vocab_size, vocab_size)
    sizes = [0 if i in tokenizer.special_ids else len(tokenizer.token_bytes(i)) for i in range(count)]
    return torch.tensor(sizes + [0] * (vocab_size - count))


def heldout(
    model: Transformer, batches: Sequence[Rows], byte_lengths: Tensor | None = None, masks: bool = True
) -> Heldout:
    """The model's loss on every target of the batches, in float32. `byte_lengths` [V] as above, else bytes are 0."""
    device = model.embed_tokens.weight.device
    nats = tokens = size = 0.0
    with evaluating(model):
        for rows in batches:
            lesson = Lesson.of(rows, masks).to(device)
            h = model(lesson.inputs, lesson.positions, lesson.attend()).flatten(0, 1)
            weights, targets = lesson.weights.flatten(), lesson.targets.flatten()
            nats += float(
                cross_entropy(h, model.lm_head.weight, targets, weights, model.config.logit_softcap)
            )
            tokens += float(weights.sum())
            if byte_lengths is not None:
                size += float((byte_lengths.to(device)[targets] * weights).sum())
    return Heldout(nats, tokens, size)


@contextmanager
def evaluating(model: Transformer) -> Iterator[None]:
    """Evaluation mode without gradients; the mode before comes back."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)
