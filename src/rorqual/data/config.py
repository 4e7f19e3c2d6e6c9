"""What `rorqual data build` does to the text, with every stage a switch."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rorqual.errors import ConfigError


@dataclass(frozen=True)
class Stages:
    """Cleaning stages, in their order; each can be turned off."""

    normalise: bool = True
    quality: bool = True
    spam: bool = True
    dedup: bool = True
    boilerplate: bool = True
    overlap: bool = True


@dataclass(frozen=True)
class BuildConfig:
    """One build. The same sources, config and seed give the same shards, whatever the number of workers."""

    sources: tuple[str, ...] = ("python",)
    out: Path = Path("data")
    vocab_size: int = 32768  # of a tokenizer to be trained
    tokenizer: Path | None = None  # a folder with tokenizer.json, instead of training one
    heldout: float = 0.02  # share of documents kept for evaluation
    evaluation: tuple[str, ...] = ()  # sources whose text must not be in the pool
    limit_mb: float | None = None  # stop at this size of files; one of lines is cut there, another read whole
    tokenizer_mb: float = 20.0  # text that the tokenizer is trained on
    text_key: str = "text"  # of JSON lines and parquet columns
    max_malformed: float = 0.1  # share of records that may be unreadable before the build stops
    workers: int = 0  # processes; 0: one a core
    seed: int = 0
    stages: Stages = field(default_factory=Stages)

    def __post_init__(self) -> None:
        if not self.sources:
            raise ConfigError("sources: name at least one file, folder or pattern, or the word python")
        if not 0 <= self.heldout < 1:
            raise ConfigError(f"heldout={self.heldout}: must be 0 to less than 1")
        if self.limit_mb is not None and self.limit_mb <= 0:
            raise ConfigError(f"limit_mb={self.limit_mb}: must be above 0")
        if not 0 <= self.max_malformed <= 1:
            raise ConfigError(f"max_malformed={self.max_malformed}: must be 0 to 1")
        if not 0 <= self.seed < 1 << 64:
            raise ConfigError(f"seed={self.seed}: must be 0 to 2**64 - 1")
        if self.workers < 0:
            raise ConfigError(f"workers={self.workers}: must be 0 (one a core) or more")
