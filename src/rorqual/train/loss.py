"""Cross entropy over a vocabulary without holding the logits: chunks of rows, float32 maths, the gradient made at once.

`cross_entropy_reference` defines it. The log-softmax and differences are float32 whatever the products' dtype
(vllm-project/speculators#788).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 1 << 20  # logits of a chunk: 4 MB in float32 stay in the cache between the passes over them
CHUNKS = 4  # whose gradients are kept for one product with the hidden states


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
        need = any(ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        dh = torch.empty_like(h) if need else h
        dhead = torch.zeros_like(head, dtype=torch.float32) if need else head
        rows = min(max(CHUNK // len(head), 64), 1024)
        for start in range(0, len(h), rows * CHUNKS):
            block = slice(start, start + rows * CHUNKS)
            slopes = []
            for x, y, w in zip(*(t[block].split(rows) for t in (h, targets, weights)), strict=True):
                loss, slope = _logits(x, head, y, w, softcap, need)
                total += loss
                slopes.append(slope)
            if need:
                slope = torch.cat(slopes)
                torch.mm(slope, head, out=dh[block])
                dhead += slope.T @ h[block]
        if need:
            ctx.save_for_backward(dh, dhead)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        dh, dhead = ctx.saved_tensors
        return dh * upstream.to(dh.dtype), (dhead * upstream).to(dh.dtype), None, None, None


def _logits(
    x: Tensor, head: Tensor, targets: Tensor, weights: Tensor, softcap: float | None, need: bool
) -> tuple[Tensor, Tensor]:
    """The loss of a chunk and, where needed, its gradient by the logits in x's dtype."""
    logits = (x @ head.T).float()
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    logp = logits.log_softmax(-1)
    picked = logp.gather(1, targets[:, None])
    loss = -(picked[:, 0] * weights).sum()
    if not need:
        return loss, loss
    slope = logp.exp_()
    slope.scatter_add_(1, targets[:, None], torch.full_like(picked, -1.0))
    slope *= weights[:, None]
    if softcap is not None:
        slope *= 1 - logits.div_(softcap).square_()
    return loss, slope.to(x.dtype)
