"""`rorqual data build SOURCES --out DIR` and `rorqual data show DIR`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import tyro

from rorqual.data.config import BuildConfig, Stages
from rorqual.errors import ConfigError


@dataclass(frozen=True)
class Build:
    """Clean text and write token shards. Sources are files, folders, patterns, or the word `python`: the Python
    source on this machine."""

    sources: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="SOURCES")] = ("python",)
    out: Path = Path("data")
    vocab_size: int = 32768
    tokenizer: Path | None = None
    heldout: float = 0.02
    evaluation: tuple[str, ...] = ()
    limit_mb: float | None = None
    tokenizer_mb: float = 20.0
    text_key: str = "text"
    max_malformed: float = 0.1
    workers: int = 0
    seed: int = 0
    stages: Stages = field(default_factory=Stages)

    def config(self) -> BuildConfig:
        return BuildConfig(**self.__dict__)


def data(argv: Sequence[str]) -> int:
    """Run a subcommand."""
    if argv[:1] == ["build"]:
        return _build(argv[1:])
    if argv[:1] == ["show"]:
        return _show(argv[1:])
    if argv[:1] in (["-h"], ["--help"], []):
        print("rorqual data build SOURCES --out DIR   clean text and write token shards")
        print("rorqual data show DIR                  what is in them")
        return 0
    raise ConfigError(f"data {argv[0]!r}: must be build or show")


def _build(argv: Sequence[str]) -> int:
    config = tyro.cli(Build, args=list(argv), prog="rorqual data build").config()
    from rich.console import Console

    from rorqual.data.build import build

    console = Console(stderr=True)
    meta = build(config, lambda text: console.print(text, highlight=False))
    print(summary(config.out, meta))
    return 0


def _show(argv: Sequence[str]) -> int:
    if len(argv) != 1:
        raise ConfigError("data show: give the folder of a built set")
    from rorqual.data.shards import read_meta

    print(summary(Path(argv[0]), read_meta(Path(argv[0]))))
    return 0


def summary(folder: Path, meta: dict[str, object]) -> str:
    """A few lines on a built set."""
    tree = json.loads(json.dumps(meta))
    lines = [f"{folder}: {tree['tally']['kept']:,} of {tree['tally']['documents']:,} documents kept"]
    for split, shards in tree["splits"].items():
        tokens, size = (sum(s[k] for s in shards) for k in ("tokens", "bytes"))
        lines.append(f"  {split}: {tokens:,} tokens, {size / max(tokens, 1):.2f} bytes a token")
    lines.append(f"  vocabulary {tree['vocab_size']:,}; what was removed and why: {folder}/report.html")
    return "\n".join(lines)
