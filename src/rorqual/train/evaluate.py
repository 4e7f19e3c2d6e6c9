"""How good the model is while it trains: held-out bits per byte, samples, and the share of them that is Python."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rorqual.data.loader import Batch
from rorqual.model.attend import Cached, Causal, KVCache
from rorqual.model.transformer import Transformer
from rorqual.text.tokenizer import Tokenizer
from rorqual.train.loss import cross_entropy

PROMPTS = ("import ", "def ", "class ", "from ", "    def __init__(self", "# ", "if __name__", "@property\n")


def heldout_loss(model: Transformer, batches: Sequence[Batch], masks: bool = True) -> float:
    """Mean negative log-likelihood of a token in nats, over every target of the batches."""
    training = model.training
    model.eval()
    total = count = 0.0
    with torch.no_grad():
        for batch in batches:
            weights = target_weights(batch, masks)
            attend = Causal(batch.document_ids[:, :-1] if masks else None)
            h = model(batch.ids[:, :-1], _positions(batch, masks)[:, :-1], attend)
            targets = batch.ids[:, 1:].flatten()
            flat = h.flatten(0, 1)
            total += float(
                cross_entropy(
                    flat, model.lm_head.weight, targets, weights.flatten(), model.config.logit_softcap
                )
            )
            count += float(weights.sum())
    model.train(training)
    return total / max(count, 1.0)


def bits_per_byte(nats_per_token: float, bytes_per_token: float) -> float:
    """From nats a token to bits a byte, which compares models with different tokenizers."""
    return nats_per_token / math.log(2) / bytes_per_token


def target_weights(batch: Batch, masks: bool) -> Tensor:
    """1 for every target [B, T], but 0 where it belongs to another document than the token before it."""
    same = batch.document_ids[:, 1:] == batch.document_ids[:, :-1]
    return same.float() if masks else torch.ones_like(same, dtype=torch.float32)


def _positions(batch: Batch, masks: bool) -> Tensor:
    if masks:
        return batch.positions
    return torch.arange(batch.ids.shape[1]).expand_as(batch.ids)


def sample(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    tokens: int,
    seed: int,
    temperature: float = 0.8,
) -> list[str]:
    """One continuation of each prompt, the prompt included."""
    training = model.training
    model.eval()
    out = []
    generator = torch.Generator().manual_seed(seed)
    ends = set(model.config.eos_ids)
    with torch.no_grad():
        for prompt in prompts:
            ids = tokenizer.encode(prompt, add_bos=True)
            cache, new = KVCache(), list(ids)
            for _ in range(min(tokens, model.config.max_position_embeddings - len(ids))):
                x = torch.tensor([new])
                positions = torch.arange(cache.length, cache.length + len(new))[None]
                logits = model.logits(model(x, positions, Cached(cache))[:, -1]).float()
                token = int(torch.multinomial((logits[0] / temperature).softmax(-1), 1, generator=generator))
                if token in ends:
                    break
                ids.append(token)
                new = [token]
            out.append(tokenizer.decode(ids, skip_special=True))
    model.train(training)
    return out


def parses(text: str) -> bool:
    """Whether a text is Python once its last, possibly unfinished statement is left out."""
    lines = text.split("\n")
    for end in range(len(lines), 0, -1):
        head = "\n".join(lines[:end])
        if not head.strip():
            return False
        try:
            tree = ast.parse(head)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            if len(lines) - end >= 3:  # only a cut end is forgiven
                return False
            continue
        return bool(tree.body)
    return False
