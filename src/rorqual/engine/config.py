"""What an engine may use: cache, batch and queue limits."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from rorqual.errors import ConfigError

CacheDtype = Literal["auto", "float32", "bfloat16", "int8"]
Guesser = Literal["ngram", "mtp"]


@dataclass(frozen=True)
class EngineConfig:
    """Limits of one engine; the words are vLLM's."""

    max_model_len: int | None = (
        None  # tokens of a request, prompt and completion; None: the model's, if it fits
    )
    # Of weights and cache: cpu, cuda[:N]; auto: CUDA where there is one and the weights are not packed
    device: str = "auto"
    block_size: int = 16  # tokens of a cache block
    cache_tokens: int | None = None  # tokens that the cache holds; None: as cache_memory allows
    cache_memory: float = 1e9  # bytes for the cache
    # auto: the weights', bfloat16 where they are quantised; int8: about half of bfloat16, in groups of 64 with a scale
    cache_dtype: CacheDtype = "auto"
    max_num_seqs: int = 64  # requests running at once
    max_num_batched_tokens: int = 512  # tokens of one step: a long prompt is computed in chunks of this size
    max_waiting: int = 1024  # requests queued beyond those running
    prefix_cache: bool = True
    cache_completions: bool = (
        True  # whether a later prompt may find a completion's blocks, as in a conversation
    )
    disk_cache: Path | None = None  # a folder where full blocks are kept, also beyond a restart
    disk_cache_bytes: float = 1e10  # of that folder; the least recently used go first
    # Logits to the bit whatever the neighbours, chunks and cache: each request is computed alone, prompts in chunks that
    # begin at fixed places; slower with many requests
    batch_invariant: bool = False
    speculate: int = 0  # tokens guessed in each step of a request; 0: none
    # Who guesses: look-up of what followed the last tokens before, or the model's first multi-token prediction module,
    # which guesses one
    speculate_by: Guesser = "ngram"

    @property
    def mtp(self) -> bool:
        """Whether the model's own module guesses."""
        return self.speculate_by == "mtp"

    @property
    def chunk(self) -> int:
        """Where `batch_invariant` chunks begin: multiples of this many tokens."""
        return self.max_num_batched_tokens // self.block_size * self.block_size

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens", "max_waiting"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 1 or more")
        for name, among in (("cache_dtype", get_args(CacheDtype)), ("speculate_by", get_args(Guesser))):
            if getattr(self, name) not in among:
                raise ConfigError(f"{name}={getattr(self, name)!r}: must be one of {', '.join(among)}")
        if not 0 < self.cache_memory < float("inf"):
            raise ConfigError(f"cache_memory={self.cache_memory}: must be a number of bytes above 0")
        if not self.disk_cache_bytes > 0:
            raise ConfigError(
                f"disk_cache_bytes={self.disk_cache_bytes}: must be above 0 (inf: as the disk allows)"
            )
        if self.max_num_batched_tokens < self.max_num_seqs:
            raise ConfigError(
                f"max_num_batched_tokens={self.max_num_batched_tokens}: must be at least max_num_seqs="
                f"{self.max_num_seqs}, so that every running request advances in each step"
            )
        if self.speculate < 0:
            raise ConfigError(f"speculate={self.speculate}: must be 0 (off) or more")
        if self.disk_cache is not None and not self.prefix_cache:
            raise ConfigError(
                f"disk_cache={self.disk_cache}: contradicts prefix_cache=False; leave one of them out"
            )
        if self.batch_invariant and self.speculate:
            raise ConfigError(
                f"batch_invariant=True and speculate={self.speculate}: checked guesses are computed together, and their "
                "logits are not those of one at a time; leave one of them out"
            )
        if self.batch_invariant and self.max_num_batched_tokens < self.block_size:
            raise ConfigError(
                f"batch_invariant=True: max_num_batched_tokens={self.max_num_batched_tokens} must hold a block of "
                f"{self.block_size} tokens"
            )
        if self.speculate_by == "mtp" and self.speculate != 1:
            raise ConfigError(
                f"speculate={self.speculate}: a multi-token prediction module guesses one token a step; with "
                "speculate_by='mtp' it must be 1"
            )
        for name in ("max_model_len", "cache_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value}: must be 1 or more")
