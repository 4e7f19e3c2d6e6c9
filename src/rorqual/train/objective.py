"""What training minimises: the language loss, the experts' balance loss and the loss of multi-token prediction."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rorqual.model.moe import Routing
from rorqual.model.transformer import Transformer
from rorqual.train.batch import Lesson
from rorqual.train.candidates import Candidates
from rorqual.train.loss import cross_entropy


@dataclass
class Loss:
    """`total` = language + alpha * balance + mtp_weight * mtp, each the mean over the step's tokens or rows."""

    total: Tensor
    language: Tensor
    balance: Tensor  # without its coefficient, summed over layers: 1 a layer where all is even
    mtp: Tensor


def autocast(device: torch.device, dtype: str) -> AbstractContextManager[Any]:
    """bfloat16 products over float32 weights, or nothing."""
    return nullcontext() if dtype == "float32" else torch.autocast(device.type, torch.bfloat16)


def objective(
    model: Transformer,
    lesson: Lesson,
    tokens: float,
    share: float = 1.0,
    mtp_weight: float = 0.0,
    recompute: bool = False,
    forward: Any = None,
    candidates: Candidates | None = None,
) -> tuple[Loss, Routing | None]:
    """A micro-batch's part of the step's loss, and where its tokens went.

    `tokens`: weights of all targets of the step, so that micro-batches with few of them count for few; `share`: this
    micro-batch's part of the step's rows. `forward` stands in for the model's own (compiled). `candidates`: of which
    tokens the language loss is; without them, of all.
    """
    c = model.config
    routing = Routing() if c.n_routed_experts else None
    h = (model if forward is None else forward)(
        lesson.inputs, lesson.positions, lesson.attend(), routing, recompute
    )
    language = _language(model, h, lesson.targets, lesson.weights, candidates) / tokens
    zero = torch.zeros((), device=h.device)
    mtp = _further(model, h, lesson, routing) / tokens if len(model.mtp) and mtp_weight else zero
    balance = routing.balance_loss.to(h.device) * share if routing is not None else zero
    total = language + balance + mtp_weight * mtp
    raw = balance.detach() / c.aux_loss_alpha if c.aux_loss_alpha else zero
    return Loss(total, language.detach(), raw, mtp.detach()), routing


def _language(
    model: Transformer, h: Tensor, targets: Tensor, weights: Tensor, candidates: Candidates | None = None
) -> Tensor:
    head, cap, biases = model.lm_head.weight, model.config.logit_softcap, None
    if candidates is not None:
        head, targets, biases = head[candidates.ids], candidates.places[targets], candidates.biases
    return cross_entropy(h.flatten(0, 1), head, targets.flatten(), weights.flatten(), cap, biases)


def _further(model: Transformer, h: Tensor, lesson: Lesson, routing: Routing | None) -> Tensor:
    """Module k reads the hidden states of the one before and token i + 1 + k, and predicts token i + 2 + k
    (DeepSeek-V3, arXiv 2412.19437, equations 21 to 25)."""
    total = h.new_zeros((), dtype=torch.float32)
    for k in range(len(model.mtp)):
        h = h[:, :-1]
        length = h.shape[1]
        following = lesson.ids[:, 1 + k : 1 + k + length]
        h = model.predict_further(
            k, h, following, lesson.positions[:, :length], lesson.attend(length), routing
        )
        # A target counts where every token from the position up to it is of one document.
        weights = torch.stack([lesson.weights[:, i : i + length] for i in range(k + 2)]).amin(0)
        total = total + _language(model, h, lesson.ids[:, 2 + k : 2 + k + length], weights)
    return total / len(model.mtp)
