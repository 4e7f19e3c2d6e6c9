"""Pass one of a build, in worker processes: read a unit, judge and fingerprint each of its documents."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rorqual.data.boilerplate import line_hashes
from rorqual.data.config import Stages
from rorqual.data.dedup import Fingerprint, fingerprint
from rorqual.data.document import Document
from rorqual.data.normalise import normalise
from rorqual.data.quality import quality
from rorqual.data.sources import Skipped, Unit, read_unit
from rorqual.data.spam import spam


@dataclass
class Judged:
    """A document after pass one: its text with its fingerprints, or why it was dropped."""

    doc: Document
    raw_bytes: int
    dropped: str | None = None
    print: Fingerprint | None = None
    lines: NDArray[np.uint32] | None = None


def judge_unit(task: tuple[Unit, Stages, str]) -> tuple[list[Judged], Skipped]:
    """In a worker: the documents of a unit, judged and fingerprinted."""
    unit, stages, text_key = task
    skipped = Skipped()
    return [judge(doc, stages) for doc in read_unit(unit, skipped, text_key)], skipped


def judge(doc: Document, stages: Stages) -> Judged:
    """Run the stages that look at one document alone."""
    out = Judged(doc, len(doc.text.encode()))
    for name, stage in (("normalise", normalise), ("quality", quality), ("spam", spam)):
        if getattr(stages, name):
            reason = stage(doc)
            if reason is not None:
                out.dropped = f"{name}|{reason}"
                doc.text = doc.text[:300]
                return out
    if stages.dedup:
        out.print = fingerprint(doc.text)
    if stages.boilerplate:
        out.lines = line_hashes(doc)
    return out
