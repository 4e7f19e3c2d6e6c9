"""The text of a comparison: a pool as `rorqual data` builds it, and the same sources as they were found."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from pathlib import Path

from rorqual.checkpoint.files import write_whole
from rorqual.compare.budget import Budget
from rorqual.compare.job import fingerprint
from rorqual.compare.pool import Say
from rorqual.data.build import build
from rorqual.data.config import BuildConfig, Stages
from rorqual.data.shards import TokenSet
from rorqual.text.tokenizer import Tokenizer

HELDOUT = 0.03


def built_pool(under: Path, budget: Budget, sources: tuple[str, ...], say: Say) -> Path:
    """The pool that is trained on, built where it is not there yet; its held-out set is deduplicated against it."""
    config = _config(under, "built", budget, sources)
    if not (config.out / "meta.json").is_file():
        say(f"building the pool: {' '.join(sources)}, at most {budget.pool_mb:g} MB")
        build(config, lambda _: None)
    return config.out


def found_pool(under: Path, built: Path, budget: Budget, sources: tuple[str, ...], say: Say) -> Path:
    """The same sources with no stage but one: what overlaps the target's held-out text is taken out, or its leaks
    would count as learning. Same tokenizer."""
    config = _config(under, f"found-{fingerprint(built)}", budget, sources)
    if not (config.out / "meta.json").is_file():
        say("building the pool as it was found")
        off = Stages(normalise=False, quality=False, spam=False, dedup=False, boilerplate=False, overlap=True)
        target = str(heldout_text(built, config.out.with_suffix(".jsonl")))
        build(dataclasses.replace(config, stages=off, tokenizer=built, evaluation=(target,)), lambda _: None)
    return config.out


def _config(under: Path, name: str, budget: Budget, sources: tuple[str, ...]) -> BuildConfig:
    """A build whose folder carries a hash of what it is made of: other sources are another pool."""
    made_of = json.dumps([sources, budget.vocab_size, budget.pool_mb])
    mark = hashlib.sha256(made_of.encode()).hexdigest()[:8]
    return BuildConfig(
        sources, under / f"{name}-{mark}", vocab_size=budget.vocab_size, heldout=HELDOUT, limit_mb=budget.pool_mb,
        tokenizer_mb=8.0,
    )  # fmt: skip


def heldout_text(built: Path, path: Path) -> Path:
    """Write the held-out documents of a set as a file of JSON lines."""
    tokens, tokenizer = TokenSet(built, "heldout"), Tokenizer.load(built)
    texts = (tokenizer.decode(tokens.document(i).tolist()) for i in range(len(tokens)))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path
