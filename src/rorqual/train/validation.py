"""The callback of a run: held-out bits per byte and samples, at the steps that ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rorqual.data.loader import heldout_batches
from rorqual.data.shards import TokenSet, read_meta
from rorqual.errors import DataError
from rorqual.model.transformer import Transformer
from rorqual.text.tokenizer import Tokenizer
from rorqual.train.batch import Rows
from rorqual.train.config import TrainConfig, due
from rorqual.train.evaluate import byte_lengths, heldout
from rorqual.train.sample import PROSE_PROMPTS, PYTHON_PROMPTS, parses, sample

SAMPLE_TOKENS = 96
JUDGED = 8  # samples of each prompt whose Python is judged at the end


class Validation:
    """`heldout_loss`, `heldout_bpb`, a `sample`; at the last step `samples` and, of Python, `parsed` with its count."""

    def __init__(self, config: TrainConfig, tokenizer: Tokenizer, vocab_size: int) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.batches = heldout_rows(config)
        self.byte_lengths = byte_lengths(tokenizer, vocab_size)
        self.python = all(_is_python(folder) for folder in config.data)

    def __call__(self, model: Transformer, step: int) -> dict[str, Any]:
        c, end = self.config, step == self.config.steps
        figures: dict[str, Any] = {}
        if end or due(c.eval_every, step):
            found = heldout(model, self.batches, self.byte_lengths, c.document_masks)
            figures |= {"heldout_loss": found.loss, "heldout_bpb": found.bits_per_byte}
        if due(c.sample_every, step) or (end and c.sample_every > 0):
            figures |= self._samples(model, step, end)
        return figures

    def _samples(self, model: Transformer, step: int, end: bool) -> dict[str, Any]:
        prompts = PYTHON_PROMPTS if self.python else PROSE_PROMPTS
        if not end:
            prompt = prompts[step // self.config.sample_every % len(prompts)]
            return {"sample": sample(model, self.tokenizer, [prompt], SAMPLE_TOKENS, seed=step)[0]}
        count = JUDGED if self.python else 1
        texts = sample(model, self.tokenizer, prompts, SAMPLE_TOKENS, seed=step, count=count)
        figures: dict[str, Any] = {"sample": texts[0], "samples": texts[::count]}
        if self.python:
            figures |= {"parsed": sum(map(parses, texts)) / len(texts), "judged": len(texts)}
        return figures


def heldout_rows(config: TrainConfig) -> Sequence[Rows]:
    """Held-out batches of every set. Raises DataError where no set has a row of them."""
    batches: list[Rows] = []
    for folder in config.data:
        if TokenSet(folder, "heldout").tokens > config.seq_len:
            batches += heldout_batches(folder, min(8, config.batch_size), config.seq_len, config.eval_rows)
    if not batches:
        raise DataError(
            f"{config.data[0]}: its held-out set is shorter than a row of {config.seq_len} tokens; build it with a "
            "larger --heldout share, or train on shorter rows (seq_len)"
        )
    return batches


def _is_python(folder: Path) -> bool:
    """Whether a set is Python source, so that samples can be parsed."""
    return all(s == "python" or s.endswith(".py") for s in read_meta(folder)["config"]["sources"])
