"""Where a run's checkpoints lie."""

from __future__ import annotations

from pathlib import Path


def folder_of(run: Path, step: int) -> Path:
    """The checkpoint of a step."""
    return run / "checkpoints" / f"step-{step:08d}"


def step_of(folder: Path) -> int:
    """The step of a checkpoint."""
    return int(folder.name.removeprefix("step-"))


def steps(run: Path) -> list[int]:
    """Steps with a checkpoint, in order."""
    found = (p.name.removeprefix("step-") for p in (run / "checkpoints").glob("step-*") if p.is_dir())
    return sorted(int(name) for name in found if name.isdigit())
