"""The text of a comparison: a pool as `rorqual data` builds it, and the same sources as they were found."""

from __future__ import annotations

import dataclasses
import sysconfig
from pathlib import Path

from rorqual.compare.budget import Budget
from rorqual.compare.pool import Say
from rorqual.data.build import build
from rorqual.data.config import BuildConfig, Stages

HELDOUT = 0.03


def built_pool(folder: Path, budget: Budget, sources: tuple[str, ...], say: Say) -> Path:
    """The pool that is trained on, built where it is not there yet; its held-out set is deduplicated against it."""
    if not (folder / "meta.json").is_file():
        say(f"building the pool: {' '.join(sources)}, at most {budget.pool_mb:g} MB")
        build(_config(folder, budget, sources), lambda _: None)
    return folder


def found_pool(folder: Path, built: Path, budget: Budget, sources: tuple[str, ...], say: Say) -> Path:
    """The same sources with no stage but one: what overlaps the target's held-out text is taken out, or its leaks
    would count as learning. Same tokenizer."""
    if not (folder / "meta.json").is_file():
        say("building the pool as it was found")
        config = _config(folder, budget, sources)
        off = Stages(normalise=False, quality=False, spam=False, dedup=False, boilerplate=False, overlap=True)
        target = str(heldout_text(built))
        build(dataclasses.replace(config, stages=off, tokenizer=built, evaluation=(target,)), lambda _: None)
    return folder


def _config(folder: Path, budget: Budget, sources: tuple[str, ...]) -> BuildConfig:
    return BuildConfig(
        sources,
        folder,
        vocab_size=budget.vocab_size,
        heldout=HELDOUT,
        limit_mb=budget.pool_mb,
        tokenizer_mb=8.0,
    )


def heldout_text(built: Path) -> Path:
    """The held-out documents of a set as a file of JSON lines beside it, written where it is not there yet."""
    import json

    from rorqual.checkpoint.files import write_whole
    from rorqual.data.shards import TokenSet
    from rorqual.text.tokenizer import Tokenizer

    path = built.with_name(f"{built.name}-heldout.jsonl")
    if not path.is_file():
        tokens, tokenizer = TokenSet(built, "heldout"), Tokenizer.load(built)
        texts = (tokenizer.decode(tokens.document(i).tolist()) for i in range(len(tokens)))
        write_whole(path, "".join(json.dumps({"text": t}) + "\n" for t in texts))
    return path


def everything() -> tuple[str, ...]:
    """All text beside this Python: its library and its packages, whatever they hold."""
    return (sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"))
