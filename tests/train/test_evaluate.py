"""Held-out figures by hand, samples, and what counts as Python."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from rorqual.data.loader import heldout_batches
from rorqual.model.attend import Causal
from rorqual.model.transformer import Transformer
from rorqual.text.tokenizer import Tokenizer
from rorqual.train.evaluate import byte_lengths, heldout
from rorqual.train.sample import parses, sample
from rorqual.train.shape import Shape

TINY = Shape(depth=2, width=32, heads=2, experts=4, experts_per_token=2)


@pytest.fixture
def model(token_set: Path) -> Transformer:
    tokenizer = Tokenizer.load(token_set)
    config = TINY.model(tokenizer.vocab_size, 64, tokenizer.bos_id, tokenizer.eos_ids[0])
    return Transformer(config).init_weights(0).train()


def test_an_even_guess_costs_the_logarithm_of_the_vocabulary(model: Transformer, token_set: Path) -> None:
    """Bytes are counted over the very targets that were predicted; document beginnings have none."""
    tokenizer = Tokenizer.load(token_set)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    batches = heldout_batches(token_set, 2, 32)
    found = heldout(model, batches, byte_lengths(tokenizer, model.config.vocab_size))
    assert found.loss == pytest.approx(math.log(320), rel=1e-5)
    tokens = size = 0
    for batch in batches:
        for ids, documents in zip(batch.ids.tolist(), batch.document_ids.tolist(), strict=True):
            for i in range(1, len(ids)):
                if documents[i] == documents[i - 1]:
                    tokens += 1
                    size += len(tokenizer.decode([ids[i]], skip_special=True).encode())
    assert (found.tokens, found.bytes) == (tokens, size)
    assert found.bits_per_byte == pytest.approx(math.log2(320) * tokens / size, rel=1e-5)
    assert model.training


def test_samples_are_those_of_the_seed_and_begin_with_the_prompt(model: Transformer, token_set: Path) -> None:
    tokenizer = Tokenizer.load(token_set)
    one, two = (sample(model, tokenizer, ["def add"], 10, seed=3, count=2) for _ in range(2))
    assert one == two
    assert all(text.startswith("def add") for text in one)
    assert one[0] != one[1]
    assert sample(model, tokenizer, ["def add"], 10, seed=4, count=2) != one


def test_a_sample_is_the_models_own_most_likely_words(model: Transformer, token_set: Path) -> None:
    """At a temperature near 0: each token is the argmax of the whole prefix, computed without a cache."""
    tokenizer = Tokenizer.load(token_set)
    (text,) = sample(model, tokenizer, ["def "], 8, seed=0, temperature=1e-4)
    ids = tokenizer.encode("def ", add_bos=True)
    model.eval()
    for _ in range(8):
        x = torch.tensor([ids])
        with torch.no_grad():
            ids.append(int(model.logits(model(x, torch.arange(len(ids))[None], Causal())[0, -1]).argmax()))
    assert text == tokenizer.decode(ids, skip_special=True)


def test_sampling_stops_at_the_context(model: Transformer, token_set: Path) -> None:
    model.config = dataclasses.replace(model.config, max_position_embeddings=6)
    seen: list[int] = []
    model.register_forward_pre_hook(lambda _, inputs: seen.append(int(inputs[1].max())))
    sample(model, Tokenizer.load(token_set), ["def "], 50, seed=0)
    assert max(seen) <= 5


@pytest.mark.parametrize(
    ("text", "good"),
    [
        ("import os\n\nx = 1\n", True),
        ("def f(a):\n    return a\n\ndef g(b", True),  # cut at the length limit
        ("x = [1,\n     2,\n     3,\n     4,\n", False),  # more than three lines are open
        ("def f(a:\n    return\nx = 1\ny = 2\nz = 3\nw = 4\n", False),
        ("return return\n" * 9, False),
        ('"""only words"""\n', False),
        ("", False),
        ("# a comment\n", False),
        ("x = '\\d'\n", True),
    ],
)
def test_what_counts_as_python(text: str, good: bool) -> None:
    assert parses(text) is good
