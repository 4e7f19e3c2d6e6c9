"""From logits to a token. All in float32, in the order that `SamplingParams` states.

The draw for token i of a request is a pure function of (seed, i), so neighbours, chunks and pre-emption change
nothing: a uniform number picks from the cumulative distribution over ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from rorqual.engine.request import SamplingParams, TokenLogprob

GREEDY_BELOW = 1e-5
_MASK = (1 << 64) - 1


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from a seed and a counter (the SplitMix64 finaliser)."""
    z = (seed * 0x9E3779B97F4A7C15 + (index + 1) * 0xD1B54A32D192ED03) & _MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return ((z ^ (z >> 31)) >> 11) / (1 << 53)


def uniforms(seeds: Sequence[int], indices: Sequence[int]) -> NDArray[np.float64]:
    """`uniform` of each pair."""
    z = np.array([s & _MASK for s in seeds], np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z += (np.array(indices, np.uint64) + np.uint64(1)) * np.uint64(0xD1B54A32D192ED03)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) >> np.uint64(11)) / np.float64(1 << 53)


class Drawable(NamedTuple):
    """Logits [V] float32 that a token is drawn from, and what `survey` found: the best one's place, whether all are
    finite."""

    logits: Tensor
    best: int
    finite: bool = True


def sample(
    row: Drawable, params: SamplingParams, prompt: Sequence[int], completion: Sequence[int], seed: int
) -> tuple[int, TokenLogprob | None]:
    """Draw the next token from a finite row, with its log-probability where asked."""
    scores = shape(row.logits, params, prompt, completion)
    if params.temperature < GREEDY_BELOW:
        token = row.best if scores is row.logits else int(scores.argmax())
        return token, _logprob(scores, token, params.logprobs)
    kept = keep(scores / params.temperature, params)
    cumulative = kept.softmax(-1, dtype=torch.float64).cumsum(-1)
    point = uniform(seed, len(completion)) * float(cumulative[-1])
    token = int(torch.searchsorted(cumulative, point, right=True).clamp(max=len(cumulative) - 1))
    return token, _logprob(kept, token, params.logprobs)


def sample_rows(
    logits: Tensor,
    params: Sequence[SamplingParams],
    indices: Sequence[int],
    seeds: Sequence[int],
    best: Sequence[int],
) -> list[tuple[int, TokenLogprob | None] | None]:
    """`sample` for the rows [M, V] that ask for nothing but a temperature, all at once; None for the others.

    `indices` count the tokens that each row's completion has, `best` are the places of the rows' largest logits. The
    draws are those of `sample`.
    """
    drawn: list[tuple[int, TokenLogprob | None] | None] = [None] * len(params)
    rows = [i for i, p in enumerate(params) if p.only_temperature]
    if len(rows) < 2:
        return drawn
    picked = logits if len(rows) == len(params) else logits[rows]
    if all(params[i].temperature < GREEDY_BELOW and params[i].logprobs is None for i in rows):
        for i in rows:
            drawn[i] = best[i], None
        return drawn
    heat = torch.tensor([params[i].temperature for i in rows])
    greedy = heat < GREEDY_BELOW
    scores = picked / torch.where(greedy, 1.0, heat)[:, None]
    cumulative = scores.softmax(-1, dtype=torch.float64).cumsum(-1)
    points = torch.from_numpy(uniforms([seeds[i] for i in rows], [indices[i] for i in rows]))
    found = torch.searchsorted(cumulative, points[:, None] * cumulative[:, -1:], right=True)
    tokens = torch.where(
        greedy, torch.tensor([best[i] for i in rows]), found[:, 0].clamp(max=logits.shape[1] - 1)
    )
    ids = tokens.tolist()
    if any(params[i].logprobs is not None for i in rows):
        chosen = scores.log_softmax(-1).gather(1, tokens[:, None])[:, 0].tolist()
    else:
        chosen = [0.0] * len(rows)
    for i, token, logprob in zip(rows, ids, chosen, strict=True):
        drawn[i] = token, None if params[i].logprobs is None else TokenLogprob(token, logprob)
    return drawn


def shape(logits: Tensor, params: SamplingParams, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Bias, grammar and penalties; a copy where anything changes.

    frequency and presence: logit - count * frequency - (count > 0) * presence over the completion (OpenAI's formula);
    repetition: divided where positive, multiplied where negative, over prompt and completion (arXiv 1909.05858).
    """
    if params.plain:
        return logits
    logits = logits.clone()
    if params.logit_bias:
        ids = torch.tensor(list(params.logit_bias))
        logits[ids] += torch.tensor(list(params.logit_bias.values()), dtype=logits.dtype)
    allowed = None if params.mask is None else params.mask.allowed()
    if allowed is not None:
        logits[~_bits(allowed, len(logits))] = float("-inf")
    if params.frequency_penalty or params.presence_penalty:
        counts = Counter(completion)
        if counts:
            ids = torch.tensor(list(counts))
            times = torch.tensor(list(counts.values()), dtype=logits.dtype)
            logits[ids] -= times * params.frequency_penalty + params.presence_penalty
    if params.repetition_penalty != 1:
        ids = torch.tensor(sorted({*prompt, *completion}))
        seen = logits[ids]
        logits[ids] = torch.where(
            seen > 0, seen / params.repetition_penalty, seen * params.repetition_penalty
        )
    return logits


def keep(logits: Tensor, params: SamplingParams) -> Tensor:
    """top_k, then top_p, then min_p: logits of what is left out become -inf."""
    if 0 < params.top_k < len(logits):
        worst = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < worst, float("-inf"))
    if params.top_p < 1:
        ordered, ids = logits.sort(descending=True, stable=True)
        p = ordered.softmax(-1)
        out = p.cumsum(-1) - p >= params.top_p
        out[0] = False  # the first token is always kept, also where top_p is 0 in float32
        logits = logits.masked_fill(torch.zeros_like(out).scatter(0, ids, out), float("-inf"))
    if params.min_p > 0:
        p = logits.softmax(-1)
        logits = logits.masked_fill(p < params.min_p * p.max(), float("-inf"))
    return logits


def top_logprobs(logprobs: Tensor, token: int, count: int) -> TokenLogprob:
    """The token's log-probability with the `count` best; logprobs [V]."""
    top: tuple[tuple[int, float], ...] = ()
    if count:
        values, ids = logprobs.topk(min(count, len(logprobs)))
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(token, float(logprobs[token]), top)


def _logprob(scores: Tensor, token: int, count: int | None) -> TokenLogprob | None:
    return None if count is None else top_logprobs(scores.log_softmax(-1), token, count)


def _bits(mask: bytes, size: int) -> Tensor:
    """The first `size` bits of a mask, little endian within each byte."""
    packed = torch.frombuffer(bytearray(mask), dtype=torch.uint8)
    bits = (packed[:, None] >> torch.arange(8)) & 1
    flat = bits.flatten().bool()
    if len(flat) >= size:
        return flat[:size]
    return torch.cat((flat, torch.zeros(size - len(flat), dtype=torch.bool)))
