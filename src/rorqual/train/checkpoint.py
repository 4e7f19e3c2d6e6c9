"""Checkpoints of a run: model folders with the trainer's state beside the weights, whole or not there."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.checkpoint import hf
from rorqual.checkpoint.tensors import TensorFile, write_tensors
from rorqual.errors import CheckpointError, RunError
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer

STATE, TENSORS = "trainer.json", "trainer.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """What a run is made of at one step, besides its model: optimizer moments (and adapters), loader position,
    counters, random state."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


def folder_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run / "checkpoints" / f"step-{step:08d}"


def save(run: Path, model: Transformer, saved: Saved, tokenizer_from: Path, keep: int) -> Path:
    """Write the checkpoint of a step and drop all but the last `keep`. Raises CheckpointError where the disk fails;
    the checkpoints that are there stay whole."""
    target = folder_of(run, saved.step)

    def more(work: Path) -> None:
        tensors = {**saved.tensors, "torch_rng": torch.get_rng_state()}
        write_tensors(work / TENSORS, sorted(tensors.items()))
        sums = {path.name: digest(path) for path in sorted(work.iterdir())}
        tree = {"format": FORMAT, "step": saved.step, **saved.state, "sha256": sums}
        (work / STATE).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")

    hf.save_model(model, target, tokenizer_from=tokenizer_from, replace=target.exists(), more=more)
    for old in steps(run)[:-keep]:
        _drop(folder_of(run, old))
    return target


def steps(run: Path) -> list[int]:
    """Steps with a checkpoint, in order."""
    found = (p.name.removeprefix("step-") for p in (run / "checkpoints").glob("step-*") if p.is_dir())
    return sorted(int(name) for name in found if name.isdigit())


def latest(run: Path, say: Callable[[str], None]) -> Path | None:
    """The newest checkpoint whose checksums hold; damaged ones are passed over with a message. None: there is none."""
    for step in reversed(steps(run)):
        folder = folder_of(run, step)
        problem = next(damage(folder), None)
        if problem is None:
            return folder
        say(f"{folder.name} is damaged ({problem}); going back to the one before")
    return None


def damage(folder: Path) -> Iterator[str]:
    """What is wrong with a checkpoint's files."""
    try:
        tree = json.loads((folder / STATE).read_text(encoding="utf-8"))
        for name, want in tree["sha256"].items():
            if digest(folder / name) != want:
                yield f"{name} has another checksum"
    except FileNotFoundError as e:
        yield f"{Path(e.filename).name} is missing"
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as e:
        yield f"{STATE}: {type(e).__name__}: {e}"


def clean(run: Path, beyond: int) -> None:
    """Remove what a killed process left half-written, and checkpoints beyond a step: they were found damaged, or the
    run has gone back before them."""
    for path in (run / "checkpoints").glob(".*"):
        shutil.rmtree(path, ignore_errors=True)
    for step in steps(run):
        if step > beyond:
            _drop(folder_of(run, step))


def restore(folder: Path, config: ModelConfig) -> tuple[dict[str, Tensor], Saved]:
    """(model tensors, the rest) of a checkpoint; torch's random state is set. Raises RunError where its model is
    another than `config`."""
    found = hf.load_config(folder)
    if dataclasses.replace(found, quantization_config=None) != config:
        ours, theirs = config.to_hf(), found.to_hf()
        key = next((k for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k)), "config")
        raise RunError(
            f"{folder.resolve()}: the saved model has {key}={theirs.get(key)!r}, the run now asks for "
            f"{ours.get(key)!r}; keep it, or start another run folder"
        )
    tree = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if tree["format"] != FORMAT:
        raise CheckpointError(f"{folder.resolve()}: {STATE} has format {tree['format']}, this is {FORMAT}")
    file = TensorFile(folder / TENSORS)
    tensors = {name: file.read(name) for name in file.entries}
    weights = hf.load_model(folder, torch.float32).state_dict()
    torch.set_rng_state(tensors.pop("torch_rng"))
    return weights, Saved(int(tree["step"]), tensors, tree)


def digest(path: Path) -> str:
    """sha256 of a file."""
    found = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            found.update(chunk)
    return found.hexdigest()


def _drop(folder: Path) -> None:
    """Remove a folder, out of sight first: half of it must not look like a checkpoint."""
    hidden = folder.with_name(f".{folder.name}.old")
    try:
        folder.rename(hidden)
    except OSError:
        hidden = folder
    shutil.rmtree(hidden, ignore_errors=True)
