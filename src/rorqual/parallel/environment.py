"""What a launcher (`rorqual train --nproc`, torchrun) tells a process."""

from __future__ import annotations

import os

from rorqual.errors import ConfigError

RESTARTS = "TORCHELASTIC_RESTART_COUNT"  # torchrun's own name


def world_of() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a launcher. Raises ConfigError where what it gave cannot be."""
    try:
        rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    except ValueError as e:
        raise ConfigError(f"RANK, WORLD_SIZE: must be whole numbers ({e})") from e
    if not 0 <= rank < world:
        raise ConfigError(f"RANK={rank}, WORLD_SIZE={world}: the rank must be 0 to below the world size")
    return rank, world


def restarted() -> bool:
    """Whether this process is started again after a failure, to go on from the last checkpoint."""
    return os.environ.get(RESTARTS, "0") not in ("", "0")
