"""Text for the data benchmarks: what lies on any machine with Python, and made-up articles from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

from rorqual.data.sources import Skipped, find_files

SUBJECTS = (
    "the river",
    "a gardener",
    "my neighbour",
    "the committee",
    "an engineer",
    "the old clock",
    "every student",
)
VERBS = (
    "carries",
    "repairs",
    "remembers",
    "describes",
    "follows",
    "measures",
    "paints",
    "considers",
    "gathers",
)
OBJECTS = (
    "the bridge",
    "a quiet morning",
    "three maps",
    "the broken engine",
    "her notes",
    "a basket of apples",
)
ENDS = ("with great care", "before the rain", "and of course nobody minds", "to be certain", "that autumn")


def article(rng: random.Random, sentences: int = 40) -> str:
    """English of about 500 words; no two alike."""
    out = []
    for _ in range(sentences):
        extra = " ".join(
            f"{rng.choice('abcdefgh')}{rng.randrange(10**6):x}" for _ in range(rng.randrange(1, 4))
        )
        subject, verb = rng.choice(SUBJECTS).capitalize(), rng.choice(VERBS)
        name = f"{rng.choice('KLMNPRST')}{rng.randrange(10**6):x}"  # or 13 words could be free of chance
        out.append(f"{subject} of {name} {verb} {rng.choice(OBJECTS)} {extra} {rng.choice(ENDS)}.")
    return "\n".join(" ".join(out[i : i + 3]) for i in range(0, len(out), 3)) + "\n"


def articles(megabytes: float, seed: int = 0) -> Iterator[str]:
    """Articles up to a size."""
    rng, size = random.Random(seed), 0
    while size < megabytes * 1e6:
        text = article(rng)
        size += len(text)
        yield text


def python_source(megabytes: float) -> Iterator[str]:
    """Python source on this machine, up to a size."""
    size = 0
    for path in find_files(["python"], Skipped()):
        text = path.read_text(encoding="utf-8", errors="replace")
        size += len(text)
        if size > megabytes * 1e6:
            return
        yield text


def write_lines(path: Path, texts: Iterator[str]) -> int:
    """JSON lines; returns the bytes of text."""
    size = 0
    with path.open("w", encoding="utf-8") as file:
        for text in texts:
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())
    return size
