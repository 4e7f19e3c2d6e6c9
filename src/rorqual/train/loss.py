"""Cross entropy over a vocabulary without holding the logits: chunks of rows, float32 maths, the gradient made at once.

`cross_entropy_reference` defines it. The log-softmax and differences are float32 whatever the products' dtype
(vllm-project/speculators#788).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rorqual.kernels.softmax import softmax_rows

CHUNK = 1 << 20  # logits of a chunk: 4 MB in float32 stay in the cache between the passes over them
CHUNKS = 4  # whose gradients are kept for one product with the hidden states


def cross_entropy_reference(
    h: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    softcap: float | None = None,
    biases: Tensor | None = None,
) -> Tensor:
    """h [N, D], head [V, D], targets [N], weights [N] → sum of weight * -log p(target), float32. `biases` [V], where
    given, are added to the logits; not with a soft cap."""
    logits = F.linear(h, head, biases).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return (F.cross_entropy(logits, targets, reduction="none") * weights).sum()


def cross_entropy(
    h: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    softcap: float | None = None,
    biases: Tensor | None = None,
) -> Tensor:
    """The same in flat memory; products in autocast's dtype where it is on."""
    assert softcap is None or biases is None
    if torch.is_autocast_enabled(h.device.type):
        dtype = torch.get_autocast_dtype(h.device.type)
        h, head = h.to(dtype), head.to(dtype)
    with torch.autocast(h.device.type, enabled=False):
        biases = None if biases is None else biases.to(h.dtype)
        loss: Tensor = _Chunked.apply(h, head, targets, weights, softcap, biases)
    return loss


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        head: Tensor,
        targets: Tensor,
        weights: Tensor,
        softcap: float | None,
        biases: Tensor | None,
    ) -> Tensor:
        need = any(ctx.needs_input_grad[:2])
        total = torch.zeros((), dtype=torch.float32, device=h.device)
        dh = torch.empty_like(h) if need else h
        dhead = torch.zeros_like(head, dtype=torch.float32) if need else head
        rows = min(max(CHUNK // len(head), 64), 1024)
        kept = h.new_empty(min(rows * CHUNKS, len(h)), len(head)) if need else None
        for start in range(0, len(h), rows * CHUNKS):
            block = slice(start, start + rows * CHUNKS)
            slopes = None if kept is None else kept[: len(h[block])]
            parts = [t[block].split(rows) for t in (h, targets, weights)]
            for i, (x, y, w) in enumerate(zip(*parts, strict=True)):
                own = None if slopes is None else slopes.split(rows)[i]
                total += _rows(x, head, y, w, softcap, biases, own)
            if slopes is not None:
                torch.mm(slopes, head, out=dh[block])
                dhead += slopes.T @ h[block]
        if need:
            ctx.save_for_backward(dh, dhead)
        return total

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        dh, dhead = ctx.saved_tensors
        return dh * upstream.to(dh.dtype), (dhead * upstream).to(dh.dtype), None, None, None, None


def _rows(
    x: Tensor,
    head: Tensor,
    targets: Tensor,
    weights: Tensor,
    softcap: float | None,
    biases: Tensor | None,
    slopes: Tensor | None,
) -> Tensor:
    """The loss of a chunk; `slopes`, where given, becomes its gradient by the logits in x's dtype."""
    logits = x @ head.T if biases is None else torch.addmm(biases, x, head.T)
    if softcap is not None:
        logits = logits.float().div_(softcap).tanh_().mul_(softcap)
    sums = softmax_rows(logits, weights, slopes)
    logp = logits.gather(1, targets[:, None])[:, 0].float() - sums
    if slopes is not None:
        own = torch.expm1(logp) * weights  # in float32: near 1 a probability less 1 has few bits left
        slopes.scatter_(1, targets[:, None], own[:, None].to(slopes.dtype))
        if softcap is not None:
            slopes *= 1 - logits.div_(softcap).square_()
    return -(logp * weights).sum()
