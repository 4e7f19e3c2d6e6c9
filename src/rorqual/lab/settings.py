"""How a lab runs: slots and their limits, patience, back-end. Kept in the state file; `rorqual lab set KEY=VALUE`."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from rorqual.config import from_dict
from rorqual.errors import ConfigError
from rorqual.lab.store import Store


@dataclass(frozen=True)
class Settings:
    """Limits of a lab. Times are seconds."""

    backend: Literal["local", "slurm", "ray"] = "local"
    slots: int = 0  # trials at once; 0: as many as there are cores for `threads` (local), 64 (slurm, ray)
    threads: int = 1  # of a slot
    memory_mb: int = 0  # of a slot; 0: an even part of the machine
    bonus: bool = True  # idle slots take whoever waits for a place
    attempts: int = 3  # failures without progress before a trial is given up
    grace: float = 60.0  # from the wish to leave to the kill
    quantum: float = 60.0  # a promoted trial's time before a new idea may take its slot
    idle: float = 5.0  # without work before the scheduler leaves
    half_life: float = 6 * 3600.0  # slot seconds of all after which a person's use counts half
    min_free_mb: int = 300  # of disk, below which nothing is started
    slurm: tuple[str, ...] = ()  # more arguments of sbatch, such as --partition=short
    ray: str = ""  # address of a Ray cluster; empty: one on this machine

    def __post_init__(self) -> None:
        for name in ("threads", "attempts"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 1 or more")
        for name in ("slots", "memory_mb", "grace", "quantum", "idle", "min_free_mb"):
            if not getattr(self, name) >= 0:  # nor NaN
                raise ConfigError(f"{name}={getattr(self, name)}: must be 0 or more")
        if not self.half_life > 0:
            raise ConfigError(f"half_life={self.half_life}: must be above 0")
        if self.slurm and self.backend != "slurm":
            raise ConfigError(f"slurm={list(self.slurm)}: is for backend=slurm")
        if self.ray and self.backend != "ray":
            raise ConfigError(f"ray={self.ray!r}: is for backend=ray")

    @property
    def slot_count(self) -> int:
        """How many trials run at once."""
        if self.slots:
            return self.slots
        return max(1, cores() // self.threads) if self.backend == "local" else 64

    def slot_memory_mb(self, machine_mb: int) -> int:
        """What a trial may hold, of a machine that has so much for all of them."""
        return self.memory_mb or max(256, machine_mb // (self.slot_count if self.backend == "local" else 1))


def load_settings(store: Store) -> Settings:
    """Of a lab, with the defaults of those that were not set."""
    return from_dict(Settings, store.meta("settings") or {})


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
