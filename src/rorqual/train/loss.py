"""Cross entropy over a vocabulary without holding the logits: chunks of rows, float32 maths, the gradient made at once.

`cross_entropy_reference` defines it. Log-sum-exp and differences are float32 whatever the products' dtype
(vllm-project/speculators#788).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1024  # rows: the logits of one chunk are all that is ever in memory


def cross_entropy_reference(
    h: Tensor, head: Tensor, targets: Tensor, weights: Tensor, softcap: float | None = None
) -> Tensor:
    """h [N, D], head [V, D], targets [N], weights [N] → sum of weight * -log p(target), float32."""
    logits = F.linear(h, head).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


def cross_entropy(
    h: Tensor, head: Tensor, targets: Tensor, weights: Tensor, softcap: float | None = None
) -> Tensor:
    """The same in flat memory; products in autocast's dtype where it is on."""
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
        h, head = h.to(dtype), head.to(dtype)
    with torch.autocast(h.device.type, enabled=False):
        loss: Tensor = _Chunked.apply(h, head, targets, weights, softcap)
    return loss


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, h: Tensor, head: Tensor, targets: Tensor, weights: Tensor, softcap: float | None
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        dh = torch.empty_like(h)
        dhead = torch.zeros_like(head, dtype=torch.float32)
        need = any(ctx.needs_input_grad[:2])
        for start in range(0, len(h), CHUNK):
            rows = slice(start, start + CHUNK)
            logits = (h[rows] @ head.T).float()
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
            lse = logits.logsumexp(-1, keepdim=True)
            picked = logits.gather(1, targets[rows, None])
            total += ((lse - picked)[:, 0] * weights[rows]).sum()
            if not need:
                continue
            slope = None if softcap is None else 1 - (logits / softcap).square()
            grad = logits.sub_(lse).exp_()  # the softmax, in place
            grad.scatter_add_(1, targets[rows, None], torch.full_like(picked, -1.0))
            grad *= weights[rows, None]
            if slope is not None:
                grad *= slope
            grad = grad.to(h.dtype)
            dh[rows] = grad @ head
            dhead += grad.T @ h[rows]
        ctx.save_for_backward(dh, dhead.to(head.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dh, dhead = ctx.saved_tensors
        return dh * upstream.to(dh.dtype), dhead * upstream.to(dhead.dtype), None, None, None
