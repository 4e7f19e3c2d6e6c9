"""What `rorqual data build` finds of planted duplicates, near-duplicates, junk and leaked held-out documents, and what
it wrongly removes of clean ones."""

from __future__ import annotations

import random
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from corpus import article, write_lines
from record import Row, write_record

from rorqual.data.build import build
from rorqual.data.config import BuildConfig
from rorqual.data.shards import TokenSet
from rorqual.text.tokenizer import Tokenizer

CLEAN, EACH = 4000, 500


def main() -> int:
    """Plant, build, count."""
    rng = random.Random(1)
    clean = [article(rng) for _ in range(CLEAN)]
    planted = {
        "exact duplicates": clean[:EACH],
        "near duplicates (1% of words changed)": [changed(rng, t, 0.01) for t in clean[EACH : 2 * EACH]],
        "near duplicates (3% of words changed)": [changed(rng, t, 0.03) for t in clean[2 * EACH : 3 * EACH]],
        "junk": [junk(rng) for _ in range(EACH)],
        "leaked evaluation documents": [article(rng) for _ in range(EACH)],
    }
    kept = set(run(clean, planted))
    rows = [
        Row(
            "data, clean documents kept",
            len(kept & set(clean)) / CLEAN,
            0.999,
            "bound",
            len(kept & set(clean)) / CLEAN / 0.999,
            1.0,
        )
    ]
    for name, texts in planted.items():
        fresh = [t for t in texts if t not in clean]
        found = (
            1 - len(kept & set(fresh)) / len(texts)
            if fresh
            else 1 - (len(kept) - len(kept & set(clean))) / len(texts)
        )
        if name == "exact duplicates":
            found = 1.0 if all(t in kept for t in texts) else 0.0  # each stands once in the set that was kept
        rows.append(Row(f"data, {name} found", found, 0.99, "bound", found / 0.99, 1.0))
    write_record("data_planted", rows, clean=CLEAN, planted=EACH)
    for row in rows:
        print(row)
    return 0


def run(clean: list[str], planted: dict[str, list[str]]) -> Sequence[str]:
    """The documents that a build keeps; exact duplicates are checked by their number."""
    pool = [*clean, *(t for texts in planted.values() for t in texts)]
    with tempfile.TemporaryDirectory() as work:
        write_lines(Path(work) / "pool.jsonl", iter(pool))
        write_lines(Path(work) / "eval.jsonl", iter(planted["leaked evaluation documents"]))
        out = Path(work) / "out"
        evaluation = (f"{work}/eval.jsonl",)
        build(BuildConfig((f"{work}/pool.jsonl",), out, vocab_size=2000, heldout=0.0, evaluation=evaluation))
        tokenizer, found = Tokenizer.load(out), TokenSet(out, "train")
        texts = [tokenizer.decode(found.document(i).tolist(), skip_special=True) for i in range(len(found))]
    assert len(texts) == len(set(texts)), "an exact duplicate was kept"
    return texts


def changed(rng: random.Random, text: str, share: float) -> str:
    """A text with a share of its words exchanged."""
    words = text.split(" ")
    for _ in range(max(1, round(share * len(words)))):
        words[rng.randrange(len(words))] = f"w{rng.randrange(10**6)}"
    return " ".join(words)


def junk(rng: random.Random) -> str:
    """Debris of several kinds."""
    return rng.choice(
        (
            lambda: "\n".join(
                f"Buy now cheap price item {rng.random()} www.shop{rng.randrange(99)}.com" for _ in range(40)
            ),
            lambda: " ".join(str(rng.randrange(10**6)) for _ in range(300)),
            lambda: f"tag{rng.randrange(10**6)} " * 5,
            lambda: "\n".join([f"the same menu entry {rng.randrange(10**6)} of that site"] * 60),
            lambda: " ".join(f"#{rng.randrange(10**6)} ..." for _ in range(200)),
        )
    )()


if __name__ == "__main__":
    sys.exit(main())
