"""safetensors files, read and written tensor by tensor so that memory never holds a model twice.

The header is checked before anything is believed: sizes, offsets and dtypes must agree with each other and
with the file. Format: https://github.com/huggingface/safetensors (8 bytes of length, a JSON header, the
tensors' bytes).
"""

from __future__ import annotations

import json
import mmap
import os
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rorqual.errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
MAX_HEADER = 100_000_000  # the format's own limit
CHUNK = 32 * 1024 * 1024  # bytes converted at a time


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies in a file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # from the beginning of the file
    size: int


class TensorFile:
    """One safetensors file, its header checked, its tensors read when asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.entries, self.metadata = _read_header(path)

    def map(self, name: str) -> Tensor:
        """The tensor as a private view of the file: nothing is read until it is used."""
        entry = self.entries[name]
        if entry.size == 0:
            return torch.empty(entry.shape, dtype=entry.dtype)
        with self.path.open("rb") as file:
            view = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        flat = torch.frombuffer(view, dtype=torch.uint8, count=entry.size, offset=entry.start)
        if entry.start % entry.dtype.itemsize:
            flat = flat.clone()  # a file may pack its tensors without alignment
        return flat.view(entry.dtype).view(entry.shape)

    def read_into(self, name: str, out: Tensor) -> None:
        """Read and convert a tensor into `out` of the same shape, in pieces."""
        entry = self.entries[name]
        assert entry.shape == tuple(out.shape)
        assert out.is_contiguous()
        flat, step = out.view(-1), CHUNK // entry.dtype.itemsize
        with self.path.open("rb") as file:
            file.seek(entry.start)
            for begin in range(0, flat.numel(), step):
                piece = flat[begin : begin + step]
                if out.dtype == entry.dtype:
                    _fill(file, piece, name, self.path)
                    continue
                raw = torch.empty(piece.numel(), dtype=entry.dtype)
                _fill(file, raw, name, self.path)
                piece.copy_(raw)

    def read(self, name: str) -> Tensor:
        """The tensor as it is stored."""
        out = torch.empty(self.entries[name].shape, dtype=self.entries[name].dtype)
        self.read_into(name, out)
        return out


def _bytes(t: Tensor) -> memoryview:
    """The storage of a contiguous CPU tensor."""
    return memoryview(t.view(-1).view(torch.uint8).numpy().data)


def _fill(file: Any, out: Tensor, name: str, path: Path) -> None:
    if file.readinto(_bytes(out)) != out.numel() * out.element_size():
        raise CheckpointError(f"{path}: ends inside tensor {name}; copy the file again")


def _read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(8)
        if len(head) < 8:
            raise CheckpointError(f"{path}: {size} bytes is too short for a safetensors file; copy it again")
        length = struct.unpack("<Q", head)[0]
        if length > min(MAX_HEADER, size - 8):
            raise CheckpointError(
                f"{path}: header length {length} exceeds the file ({size} bytes); it is truncated or not safetensors"
            )
        text = file.read(length)
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: the header is not JSON ({e}); the file is damaged") from e
    if not isinstance(tree, dict):
        raise CheckpointError(f"{path}: the header is not an object; the file is damaged")
    metadata = tree.pop("__metadata__", {})
    entries = {name: _entry(path, name, value, 8 + length, size) for name, value in tree.items()}
    _check_layout(path, entries, 8 + length, size)
    return entries, metadata if isinstance(metadata, dict) else {}


def _entry(path: Path, name: str, value: Any, base: int, size: int) -> Entry:
    def bad(why: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name}: {why}; the header lies or the file is damaged")

    try:
        dtype, shape, (begin, end) = value["dtype"], value["shape"], value["data_offsets"]
    except (TypeError, KeyError, ValueError) as e:
        raise bad("entry without dtype, shape and data_offsets") from e
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise bad(f"dtype {dtype!r} and shape {shape!r} must be a name and a list")
    if dtype not in DTYPES:
        raise CheckpointError(
            f"{path}: tensor {name}: dtype {dtype!r} is not supported; known: {', '.join(DTYPES)}"
        )
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise bad("shape and offsets must be whole numbers")
    count = 1
    for n in shape:
        count *= n
    if end - begin != count * DTYPES[dtype].itemsize:
        raise bad(
            f"shape {shape} of {dtype} needs {count * DTYPES[dtype].itemsize} bytes, offsets give {end - begin}"
        )
    if base + end > size:
        raise bad(f"ends at byte {base + end} of {size}")
    return Entry(DTYPES[dtype], tuple(shape), base + begin, end - begin)


def _check_layout(path: Path, entries: Mapping[str, Entry], base: int, size: int) -> None:
    """Tensors must lie side by side: overlaps and holes hide one tensor's bytes in another's."""
    at, last = base, ""
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].size)):
        if entry.start != at:
            word = "overlaps" if entry.start < at else "leaves a hole after"
            raise CheckpointError(f"{path}: tensor {name} {word} {last or 'the header'}; the file is damaged")
        at, last = entry.start + entry.size, name
    if at != size:
        raise CheckpointError(f"{path}: {size - at} bytes after the last tensor; the file is damaged")


def write_tensors(
    path: Path, tensors: Iterable[tuple[str, Tensor]], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file, streaming; it is synced to disk, but naming it is the caller's affair."""
    listed = [(name, t.detach()) for name, t in tensors]
    header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
    at = 0
    for name, t in listed:
        size = t.numel() * t.element_size()
        header[name] = {"dtype": _NAMES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, t in listed:
            file.write(_bytes(t.cpu().contiguous()))
        file.flush()
        os.fsync(file.fileno())
