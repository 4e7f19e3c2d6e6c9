"""Samples of a model in training, and how much of what it writes is Python."""

from __future__ import annotations

import ast
import warnings
from collections.abc import Sequence

import torch

from rorqual.model.attend import Cached, KVCache
from rorqual.model.transformer import Transformer
from rorqual.text.tokenizer import Tokenizer
from rorqual.train.evaluate import evaluating

# Without a space behind them: the space belongs to the next token, and a model has never seen it alone.
PYTHON_PROMPTS = ("import", "from", "def", "class", "if", "for", "with", "@")
PROSE_PROMPTS = ("The", "In", "A", "When")
TEMPERATURE = 0.5  # a model after some minutes of training is sure of little


def sample(
    model: Transformer,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    tokens: int,
    seed: int,
    count: int = 1,
    temperature: float = TEMPERATURE,
) -> list[str]:
    """`count` continuations of each prompt, the prompt included, drawn from a generator of their own."""
    generator = torch.Generator().manual_seed(seed)
    texts = []
    with evaluating(model):
        for prompt in prompts:
            ids = tokenizer.encode(prompt, add_bos=tokenizer.bos_id is not None)
            rows = _continue(model, ids, tokens, count, temperature, generator)
            texts += [tokenizer.decode(row, skip_special=True) for row in rows]
    return texts


def _continue(
    model: Transformer,
    ids: Sequence[int],
    tokens: int,
    count: int,
    temperature: float,
    generator: torch.Generator,
) -> list[list[int]]:
    device = model.embed_tokens.weight.device
    ends = set(model.config.eos_ids)
    rows = [list(ids) for _ in range(count)]
    cache, new = KVCache(), torch.tensor(rows)
    for _ in range(min(tokens, model.config.max_position_embeddings - len(ids))):
        positions = torch.arange(cache.length, cache.length + new.shape[1]).expand_as(new)
        h = model(new.to(device), positions.to(device), Cached(cache))
        logits = model.logits(h[:, -1]).float().cpu()
        new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
        for row, token in zip(rows, new[:, 0].tolist(), strict=True):
            if len(row) == len(ids) or row[-1] not in ends:
                row.append(token)
        if all(row[-1] in ends for row in rows):
            break
    return rows


def parses(text: str) -> bool:
    """Whether a text cut at some length is Python: `ast.parse` takes it once its unfinished end, at most three lines,
    is left out, and finds a statement that is no mere string."""
    lines = text.split("\n")
    for end in range(len(lines), max(len(lines) - 4, 0), -1):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the model's odd escapes are its own affair
                body = ast.parse("\n".join(lines[:end])).body
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            continue
        return any(not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant)) for s in body)
    return False
