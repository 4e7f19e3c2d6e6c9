"""Tensors that many processes hold in parts: each writes a file of its own, and any number of them read what they need.

A file is safetensors; its metadata say of each tensor how large the whole is and where the part begins.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from rorqual.checkpoint.tensors import TensorFile, write_tensors
from rorqual.errors import CheckpointError


class Box(Protocol):
    """A part of a tensor of `shape`: from `start`, of `size`, in each dimension."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def start(self) -> tuple[int, ...]: ...
    @property
    def size(self) -> tuple[int, ...]: ...


@dataclass(frozen=True)
class _Part:
    file: TensorFile
    name: str
    shape: tuple[int, ...]
    start: tuple[int, ...]
    size: tuple[int, ...]


def name_of(rank: int, world: int) -> str:
    """The file of a process."""
    return f"rank-{rank:05d}-of-{world:05d}.safetensors"


def write_pieces(path: Path, tensors: Mapping[str, Tensor], boxes: Mapping[str, Box]) -> None:
    """Write what one process holds."""
    where = {n: {"shape": boxes[n].shape, "start": boxes[n].start} for n in tensors}
    write_tensors(path, sorted(tensors.items()), {"format": "pt", "pieces": json.dumps(where)})


class Pieces:
    """The tensors of a folder of such files. Raises CheckpointError where a file is missing or lies."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        paths = sorted(folder.glob("rank-*-of-*.safetensors"))
        world = int(paths[0].stem.rpartition("-")[2]) if paths else 0
        wanted = [folder / name_of(r, world) for r in range(world)]
        if not paths or paths != wanted:
            missing = next((p.name for p in wanted if p not in paths), name_of(0, 1))
            raise CheckpointError(f"{folder.resolve()}: {missing} is not there; copy the whole checkpoint")
        self.parts: dict[str, list[_Part]] = {}
        for path in paths:
            for part in _parts(TensorFile(path)):
                same = self.parts.setdefault(part.name, [])
                other = next((p for p in same if _common(p, part) is not None), None)
                if other is not None:
                    raise CheckpointError(
                        f"{folder.resolve()}: {other.file.path.name} and {path.name} both hold values of {part.name}; "
                        "the checkpoint is damaged"
                    )
                same.append(part)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole tensor."""
        return self._of(name)[0].shape

    def read(self, name: str, box: Box | None = None) -> Tensor:
        """A tensor, or a part of it, put together from whatever files hold it."""
        parts = self._of(name)
        shape = parts[0].shape
        wanted = box or _Part(parts[0].file, name, shape, (0,) * len(shape), shape)
        if box is not None and box.shape != shape:
            raise CheckpointError(f"{self.folder.resolve()}: {name} is {shape}, the run asks for {box.shape}")
        out = torch.empty(wanted.size, dtype=parts[0].file.entries[name].dtype)
        filled = 0
        for part in parts:
            common = _common(wanted, part)
            if common is None:
                continue
            to = tuple(slice(w - a, h - a) for (w, h), a in zip(common, wanted.start, strict=True))
            of = tuple(slice(w - b, h - b) for (w, h), b in zip(common, part.start, strict=True))
            out[to] = part.file.map(name)[of]
            filled += out[to].numel()
        if filled != out.numel():
            raise CheckpointError(
                f"{self.folder.resolve()}: the files hold {filled:,} of {out.numel():,} values of {name}; the "
                "checkpoint is not whole"
            )
        return out

    def _of(self, name: str) -> list[_Part]:
        if name not in self.parts:
            raise CheckpointError(
                f"{self.folder.resolve()}: holds no {name}; it is of another model or optimizer"
            )
        return self.parts[name]


def _common(a: Box, b: Box) -> list[tuple[int, int]] | None:
    """Where two parts of a tensor overlap, from and to in each dimension; None: nowhere."""
    low = [max(x, y) for x, y in zip(a.start, b.start, strict=True)]
    high = [min(x + n, y + m) for x, n, y, m in zip(a.start, a.size, b.start, b.size, strict=True)]
    return None if any(h <= w for w, h in zip(low, high, strict=True)) else list(zip(low, high, strict=True))


def _parts(file: TensorFile) -> Iterator[_Part]:
    try:
        where = json.loads(file.metadata["pieces"])
        for name, entry in file.entries.items():
            shape, start = tuple(where[name]["shape"]), tuple(where[name]["start"])
            fits = all(
                a >= 0 and a + n <= whole for a, n, whole in zip(start, entry.shape, shape, strict=True)
            )
            if not fits:
                raise ValueError(f"{name} reaches beyond its tensor")
            yield _Part(file, name, shape, start, entry.shape)
    except (KeyError, TypeError, ValueError) as e:
        raise CheckpointError(f"{file.path.resolve()}: says not where its pieces belong ({e})") from e
