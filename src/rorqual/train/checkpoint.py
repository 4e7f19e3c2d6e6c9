"""Checkpoints of a run: model folders with the trainer's state beside the weights, whole or not there."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.checkpoint import hf
from rorqual.checkpoint.tensors import TensorFile, write_tensors
from rorqual.errors import CheckpointError, RunError
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer

STATE, MOMENTS = "trainer.json", "optimizer.safetensors"


def folder_of(run: Path, step: int) -> Path:
    return run / "checkpoints" / f"step-{step:08d}"


def save(
    run: Path,
    step: int,
    model: Transformer,
    moments: Mapping[str, Tensor],
    state: Mapping[str, Any],
    tokenizer_from: Path,
    keep: int,
) -> Path:
    """Write the checkpoint of a step and drop all but the last `keep`. Raises CheckpointError where the disk fails;
    the checkpoints that are there stay whole."""
    target = folder_of(run, step)
    if target.exists():
        return target
    tensors = {**moments, "torch_rng": torch.get_rng_state()}

    def more(work: Path) -> None:
        write_tensors(work / MOMENTS, sorted(tensors.items()))
        sums = {name: _digest(work / name) for name in sorted(p.name for p in work.iterdir())}
        text = json.dumps({"step": step, **state, "sha256": sums}, indent=1)
        (work / STATE).write_text(text + "\n", encoding="utf-8")

    hf.save_model(model, target, tokenizer_from=tokenizer_from, more=more)
    for old in list_steps(run)[:-keep]:
        shutil.rmtree(folder_of(run, old), ignore_errors=True)
    return target


def list_steps(run: Path) -> list[int]:
    """Steps with a checkpoint, in order."""
    return sorted(
        int(p.name.removeprefix("step-")) for p in (run / "checkpoints").glob("step-*") if p.is_dir()
    )


def latest(run: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose checksums hold; damaged ones are passed over with a message. None: there is none."""
    for step in reversed(list_steps(run)):
        folder = folder_of(run, step)
        problem = _damage(folder)
        if problem is None:
            return folder
        say(f"{folder.name} is damaged ({problem}); going back to the one before")
    return None


def _damage(folder: Path) -> str | None:
    try:
        sums = json.loads((folder / STATE).read_text(encoding="utf-8"))["sha256"]
        for name, want in sums.items():
            if _digest(folder / name) != want:
                return f"{name} has another checksum"
    except (OSError, ValueError, KeyError) as e:
        return f"{type(e).__name__}: {e}"
    return None


def restore(folder: Path, config: ModelConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Any]]:
    """(model tensors, optimizer moments, trainer state) of a checkpoint. Raises RunError where its model is another."""
    state = json.loads((folder / STATE).read_text(encoding="utf-8"))
    saved = hf.load_config(folder)
    if saved != config:
        ours, theirs = config.to_hf(), saved.to_hf()
        key = next((k for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k)), "config")
        raise RunError(
            f"{folder.resolve()}: {key}={theirs.get(key)!r}, the run now asks for {ours.get(key)!r}; keep it, or "
            "start another run folder"
        )
    model = hf.load_model(folder, torch.float32)
    file = TensorFile(folder / MOMENTS)
    moments = {name: file.read(name) for name in file.entries}
    rng = moments.pop("torch_rng", None)
    if rng is None:
        raise CheckpointError(
            f"{folder.resolve()}: {MOMENTS} has no torch_rng; it is not a trainer's checkpoint"
        )
    torch.set_rng_state(rng)
    return dict(model.state_dict()), moments, state


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
