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
from rorqual.checkpoint.files import take_name
from rorqual.checkpoint.pieces import Box, Pieces, name_of, write_pieces
from rorqual.checkpoint.tensors import TensorFile, write_tensors
from rorqual.errors import CheckpointError, RunError
from rorqual.model.config import ModelConfig
from rorqual.model.transformer import Transformer
from rorqual.parallel.mesh import Mesh, PeerFailed
from rorqual.train.folders import folder_of, steps

STATE, TENSORS = "trainer.json", "trainer.safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Saved:
    """What a run is made of at one step, besides its model: optimizer moments (and adapters), loader position,
    counters, random state."""

    step: int
    tensors: Mapping[str, Tensor]
    state: Mapping[str, Any]


@dataclass(frozen=True)
class Parts:
    """What one process writes: its tensors, `model.NAME` and `state.NAME`, and where they belong."""

    tensors: Mapping[str, Tensor]
    boxes: Mapping[str, Box]


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


def save_parts(
    run: Path, config: ModelConfig, saved: Saved, parts: Parts, tokenizer_from: Path, keep: int, mesh: Mesh
) -> Path:
    """`save` by many processes, each with its parts; all of them see the same folder. Raises CheckpointError on every
    one where one fails."""
    target = folder_of(run, saved.step)
    work = target.with_name(f".{target.name}.partial")
    mine = work / hf.PIECES / name_of(mesh.rank, mesh.world)

    def begin() -> None:
        shutil.rmtree(work, ignore_errors=True)
        mine.parent.mkdir(parents=True)

    def write() -> Tensor:
        write_pieces(mine, parts.tensors, parts.boxes)
        return torch.frombuffer(bytearray.fromhex(digest(mine)), dtype=torch.uint8)

    def end() -> None:
        hf.write_config(config, work, torch.float32, tokenizer_from)
        sums = {
            f"{hf.PIECES}/{name_of(r, mesh.world)}": bytes(d).hex() for r, d in enumerate(digests.tolist())
        }
        sums |= {path.name: digest(path) for path in sorted(work.iterdir()) if path.is_file()}
        tree = {"format": FORMAT, "step": saved.step, **saved.state, "sha256": sums}
        (work / STATE).write_text(json.dumps(tree, indent=1) + "\n", encoding="utf-8")
        take_name(work, target)
        for old in steps(run)[:-keep]:
            _drop(folder_of(run, old))

    try:
        mesh.together(begin, alone=True)
        found = mesh.together(write)
        assert found is not None
        digests = mesh.teams["world"].gather(found)
        mesh.together(end, alone=True)
    except (OSError, PeerFailed) as e:
        why = getattr(e, "strerror", None) or e
        raise CheckpointError(f"{target}: cannot be written ({why}); nothing was left behind") from e
    return target


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


def restore(
    folder: Path, config: ModelConfig, boxes: Mapping[str, Box] | None = None
) -> tuple[dict[str, Tensor], Saved]:
    """(model tensors, the rest) of a checkpoint; torch's random state is set. `boxes`: which part of a tensor is wanted,
    where it is not the whole. Raises RunError where its model is another than `config`."""
    # A checkpoint is never quantised, whatever the run began with.
    found, config = (
        dataclasses.replace(c, quantization_config=None) for c in (hf.load_config(folder), config)
    )
    if found != config:
        ours, theirs = config.to_hf(), found.to_hf()
        key = next((k for k in sorted({*ours, *theirs}) if ours.get(k) != theirs.get(k)), "config")
        raise RunError(
            f"{folder.resolve()}: the saved model has {key}={theirs.get(key)!r}, the run now asks for "
            f"{ours.get(key)!r}; keep it, or start another run folder"
        )
    tree = json.loads((folder / STATE).read_text(encoding="utf-8"))
    if tree["format"] != FORMAT:
        raise CheckpointError(f"{folder.resolve()}: {STATE} has format {tree['format']}, this is {FORMAT}")
    weights, tensors = (_of_parts if (folder / hf.PIECES).is_dir() else _of_whole)(folder, boxes or {})
    torch.set_rng_state(tensors.pop("torch_rng"))
    return weights, Saved(int(tree["step"]), tensors, tree)


def _of_whole(folder: Path, boxes: Mapping[str, Box]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    file = TensorFile(folder / TENSORS)
    tensors = {name: file.read(name) for name in file.entries}
    weights = hf.load_model(folder, torch.float32).state_dict()
    return _cut(weights, boxes), _cut(tensors, boxes)


def _of_parts(folder: Path, boxes: Mapping[str, Box]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    pieces = Pieces(folder / hf.PIECES)
    weights: dict[str, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    for full in pieces.parts:
        kind, _, name = full.partition(".")
        (weights if kind == hf.MODEL else tensors)[name] = pieces.read(full, boxes.get(name))
    if "embed_tokens.weight" in weights and "lm_head.weight" not in weights:
        weights["lm_head.weight"] = weights["embed_tokens.weight"]  # tied: one tensor under two names
    return weights, tensors


def _cut(tensors: Mapping[str, Tensor], boxes: Mapping[str, Box]) -> dict[str, Tensor]:
    cut = {}
    for name, t in tensors.items():
        box = boxes.get(name)
        if box is not None:
            t = t[tuple(slice(a, a + n) for a, n in zip(box.start, box.size, strict=True))].clone()
        cut[name] = t
    return cut


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
