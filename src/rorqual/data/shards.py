"""Token shards: ids of whole documents in plain files, mapped into memory, with their boundaries and checksums.

NAME.bin holds ids (uint16 where the vocabulary allows it, else uint32), NAME.idx the offsets of documents in tokens
(uint64, one more than documents).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rorqual.errors import DataError

SHARD_TOKENS = 50_000_000


def id_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 holds ids up to 65,535 (huggingface/transformers#2825)."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


@dataclass(frozen=True)
class ShardInfo:
    """One shard as meta.json lists it."""

    name: str
    documents: int
    tokens: int
    bytes: int  # of the text behind the tokens
    sha256: str  # of the ids


class ShardWriter:
    """Appends documents to shards of one split."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self.folder, self.dtype = folder, id_dtype(vocab_size)
        self.vocab_size = vocab_size
        self.shards: list[ShardInfo] = []
        folder.mkdir(parents=True, exist_ok=True)
        self._open()

    def _open(self) -> None:
        self._file = (self.folder / f"{len(self.shards):05d}.bin").open("wb")
        self._digest = hashlib.sha256()
        self._offsets = [0]
        self._bytes = 0

    def add(self, ids: Sequence[int] | NDArray[Any], text_bytes: int) -> None:
        """One document's ids; raises DataError for an id outside the vocabulary."""
        array = np.asarray(ids)
        if len(array) and (int(array.min()) < 0 or int(array.max()) >= self.vocab_size):
            raise DataError(f"token id {int(array.max())}: the vocabulary has {self.vocab_size}")
        raw = array.astype(self.dtype).tobytes()
        self._file.write(raw)
        self._digest.update(raw)
        self._offsets.append(self._offsets[-1] + len(array))
        self._bytes += text_bytes
        if self._offsets[-1] >= SHARD_TOKENS:
            self._close()
            self._open()

    def close(self) -> list[ShardInfo]:
        """Finish the last shard and return all."""
        self._close()
        return self.shards

    def _close(self) -> None:
        self._file.close()
        name = f"{len(self.shards):05d}"
        np.array(self._offsets, dtype=np.uint64).tofile(self.folder / f"{name}.idx")
        self.shards.append(
            ShardInfo(name, len(self._offsets) - 1, self._offsets[-1], self._bytes, self._digest.hexdigest())
        )


class TokenSet:
    """A split of a built folder: documents by number, over all its shards."""

    def __init__(self, folder: Path, split: str, verify: bool = False) -> None:
        meta = read_meta(folder)
        if split not in meta["splits"]:
            raise DataError(f"{folder.resolve()}: no split {split!r}; it has {', '.join(meta['splits'])}")
        self.vocab_size = int(meta["vocab_size"])
        dtype = np.dtype(meta["dtype"])
        self.bytes = sum(s["bytes"] for s in meta["splits"][split])
        self.fingerprint = fingerprint(meta, split)
        self._ids: list[NDArray[Any]] = []
        self._starts: list[NDArray[np.uint64]] = []
        for shard in meta["splits"][split]:
            path = folder / split / f"{shard['name']}.bin"
            if not path.is_file() or path.stat().st_size != shard["tokens"] * dtype.itemsize:
                raise DataError(
                    f"{path.resolve()}: missing or not {shard['tokens']} tokens long; build the set again"
                )
            empty = shard["tokens"] == 0
            self._ids.append(np.empty(0, dtype) if empty else np.memmap(path, dtype=dtype, mode="r"))
            self._starts.append(_starts(path.with_suffix(".idx"), shard))
            if verify and hashlib.sha256(self._ids[-1].tobytes()).hexdigest() != shard["sha256"]:
                raise DataError(
                    f"{path.resolve()}: checksum differs; the shard is damaged, build the set again"
                )
        lengths = [np.diff(s.astype(np.int64)) for s in self._starts]
        self.lengths = np.concatenate(lengths) if lengths else np.empty(0, dtype=np.int64)
        self._first = np.cumsum([0, *(len(n) for n in lengths)])
        self.tokens = int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def document(self, number: int) -> NDArray[Any]:
        """The ids of a document, as a view of the file."""
        shard = int(np.searchsorted(self._first, number, side="right")) - 1
        starts = self._starts[shard]
        local = number - int(self._first[shard])
        return self._ids[shard][int(starts[local]) : int(starts[local + 1])]


def _starts(path: Path, shard: dict[str, Any]) -> NDArray[np.uint64]:
    """Where each document of a shard begins, and the end of the last. Raises DataError for a damaged file."""
    if not path.is_file():
        raise DataError(f"{path.resolve()}: missing; build the set again")
    starts = np.fromfile(path, dtype=np.uint64)
    whole = len(starts) == shard["documents"] + 1 and path.stat().st_size == 8 * len(starts)
    if not whole or starts[0] or starts[-1] != shard["tokens"] or (starts[1:] < starts[:-1]).any():
        raise DataError(
            f"{path.resolve()}: damaged (not the bounds of {shard['documents']} documents); build the set again"
        )
    return starts


def fingerprint(meta: dict[str, Any], split: str) -> str:
    """What a split's ids are known by, whatever their folder is called: a hash of its shards' checksums."""
    sums = " ".join(shard["sha256"] for shard in meta["splits"][split])
    return hashlib.sha256(sums.encode()).hexdigest()[:16]


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json of a built folder. Raises DataError where the folder is not (wholly) built."""
    path = folder / "meta.json"
    if not path.is_file():
        raise DataError(
            f"{folder.resolve()}: no meta.json; build it with `rorqual data build SOURCES --out {folder}`"
        )
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(meta, dict)
        _ = meta["vocab_size"], meta["dtype"], meta["splits"]
    except (ValueError, KeyError, AssertionError) as e:
        raise DataError(f"{path.resolve()}: damaged ({e}); build the set again") from e
    return meta


def describe(shards: Sequence[ShardInfo]) -> list[dict[str, Any]]:
    """Shards as meta.json holds them."""
    return [asdict(s) for s in shards]
