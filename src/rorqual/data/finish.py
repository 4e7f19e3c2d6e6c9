"""Pass two of a build, in worker processes: cut boilerplate, drop overlaps, tokenise."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rorqual.data.boilerplate import cut_boilerplate
from rorqual.data.config import Stages
from rorqual.data.document import Document
from rorqual.data.overlap import SHARE, NgramSet
from rorqual.data.shards import id_dtype
from rorqual.text.tokenizer import Tokenizer


@dataclass
class Finisher:
    """What a worker needs for pass two; made once in each process."""

    tokenizer: Tokenizer
    counts: NDArray[np.uint8]
    heldout: NgramSet
    evaluation: NgramSet
    stages: Stages

    def finish(
        self, trees: Sequence[dict[str, str]], split: str
    ) -> tuple[list[Any], list[tuple[str, Document]], int]:
        """(ids and text bytes of each kept document), (dropped with reason), lines cut."""
        kept, dropped, cut = [], [], 0
        for tree in trees:
            doc = Document(**tree)  # type: ignore[arg-type]
            if self.stages.boilerplate:
                cut += cut_boilerplate(doc, self.counts)
            reason = self._overlap(doc, split) if doc.text.strip() else "empty after boilerplate"
            if reason is not None:
                doc.text = doc.text[:300]
                dropped.append((reason, doc))
            else:
                kept.append(doc.text)
        ids = self.tokenizer.encode_batch(kept)
        bos = [] if self.tokenizer.bos_id is None else [self.tokenizer.bos_id]
        eos = list(self.tokenizer.eos_ids[:1])
        dtype = id_dtype(self.tokenizer.vocab_size)
        out = [
            (np.array([*bos, *i, *eos], dtype=dtype), len(t.encode())) for i, t in zip(ids, kept, strict=True)
        ]
        return out, dropped, cut

    def _overlap(self, doc: Document, split: str) -> str | None:
        if not self.stages.overlap:
            return None
        if len(self.evaluation) and self.evaluation.share(doc.text) > 0:
            return "shares a 13-gram with the evaluation set"
        if split == "train" and self.heldout.share(doc.text) > SHARE:
            return f"over {SHARE:.0%} of its 13-grams are in the held-out set"
        return None


_finisher: Finisher | None = None  # of this process


COUNTS, HELDOUT, EVALUATION = "lines.u8", "heldout.u64", "evaluation.u64"  # files in the build's folder


def _prepare(folder: Path, stages: Stages) -> None:
    global _finisher
    table = np.memmap(folder / COUNTS, dtype=np.uint8, mode="r")
    heldout, evaluation = (NgramSet.open(folder / name) for name in (HELDOUT, EVALUATION))
    _finisher = Finisher(Tokenizer.load(folder), table, heldout, evaluation, stages)


def finish_batch(task: tuple[list[dict[str, str]], str, Path, Stages]) -> tuple[list[Any], list[Any], int]:
    """In a worker: tokenise a batch of documents of one split, with what lies in the build's folder."""
    trees, split, folder, stages = task
    if _finisher is None:
        _prepare(folder, stages)
    assert _finisher is not None
    return _finisher.finish(trees, split)


def forget() -> None:
    """Drop what this process made for an earlier build."""
    global _finisher
    _finisher = None


def batches(trees: Iterable[dict[str, str]], size: int = 1_000_000) -> Iterator[list[dict[str, str]]]:
    """Documents in groups of about `size` characters."""
    batch: list[dict[str, str]] = []
    total = 0
    for tree in trees:
        batch.append(tree)
        total += len(tree["text"])
        if total >= size:
            yield batch
            batch, total = [], 0
    if batch:
        yield batch
