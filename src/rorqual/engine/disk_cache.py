"""Cache blocks on disk, found again after a restart: DeepSeek's context caching on disk.

A block is one file, named after the hash of its tokens, of the weights that computed it and of the cache's form; it holds
a checksum and the block's rows of every layer. Written when a block is full, read when a prompt begins with its tokens
and memory has forgotten them. Nothing here can fail a request: what cannot be read is a miss, what cannot be written is
left out.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import time
from collections import OrderedDict
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor

from rorqual.device import format_bytes
from rorqual.engine.blocks import Hash
from rorqual.engine.cache import PagedCache
from rorqual.errors import ConfigError

log = logging.getLogger(__name__)
_SUM = 16  # bytes of the checksum before the rows


class DiskCache:
    """Files of at most `limit` bytes in all; the least recently used go first."""

    def __init__(self, folder: Path, limit: float, cache: PagedCache, block_size: int, owner: bytes) -> None:
        """`owner` is a digest of everything that a block depends on besides its tokens. Raises ConfigError where the
        folder cannot be used."""
        self.folder, self.limit, self.cache, self.block_size, self.owner = (
            folder,
            limit,
            cache,
            block_size,
            owner,
        )
        self._size = _SUM + sum(r.element_size() * r[0].numel() * block_size for r in cache.rows)
        if limit < self._size:
            raise ConfigError(
                f"disk_cache_bytes={limit:.0f}: one block of {block_size} tokens takes {format_bytes(self._size)}"
            )
        try:
            folder.mkdir(parents=True, exist_ok=True)
            found = sorted(
                (f for f in folder.iterdir() if f.suffix == ".block"), key=lambda f: f.stat().st_mtime
            )
            for left in folder.glob("*.tmp"):  # of a process that was killed; another's write takes no minute
                if time.time() - left.stat().st_mtime > 60:
                    left.unlink()
        except OSError as e:
            raise ConfigError(f"disk_cache={folder}: cannot be used ({e})") from e
        # Files of other models count as well: the limit is the folder's.
        self._files: OrderedDict[str, int] = OrderedDict((f.name, f.stat().st_size) for f in found)
        self._bytes = sum(self._files.values())
        self._whole: set[str] = set()  # files that this process has written or read
        self.writes = True

    def load(self, name: Hash, block: int) -> bool:
        """Fill a block with what is kept under a name; False where nothing whole is."""
        path = self.folder / self._file(name)
        try:
            data = path.read_bytes()
        except OSError:
            return False
        if len(data) != self._size or hashlib.blake2b(data[_SUM:], digest_size=_SUM).digest() != data[:_SUM]:
            log.warning("disk cache: %s is damaged and was removed", path.name)
            self._forget(path.name)
            return False
        at = _SUM
        part = slice(block * self.block_size, (block + 1) * self.block_size)
        for rows in self.cache.rows:
            target = rows[part]
            size = target.numel() * target.element_size()
            raw = torch.frombuffer(bytearray(data[at : at + size]), dtype=torch.uint8)
            target.copy_(raw.view(target.dtype).view(target.shape))
            at += size
        self._count(path.name)
        with contextlib.suppress(OSError):  # its age is lost at a restart, nothing else
            os.utime(path)
        return True

    def save(self, name: Hash, block: int) -> None:
        """Keep a full block, unless it is there."""
        file = self._file(name)
        path, temporary = self.folder / file, self.folder / f"{file}.{os.getpid()}.tmp"
        # Another process on this folder may have removed what this one wrote.
        if not self.writes or (file in self._whole and os.path.exists(path)):
            return
        part = slice(block * self.block_size, (block + 1) * self.block_size)
        data = b"".join(_bytes(rows[part]) for rows in self.cache.rows)
        try:
            self._drop(file)  # one that nobody could read whole is written again
            while self._files and self._bytes + self._size > self.limit:
                self._forget(next(iter(self._files)))
            temporary.write_bytes(hashlib.blake2b(data, digest_size=_SUM).digest() + data)
            os.replace(temporary, path)
        except OSError as e:
            log.warning("disk cache: nothing more is written (%s)", e)
            self.writes = False
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            return
        self._count(file)

    def _file(self, name: Hash) -> str:
        return hashlib.blake2b(name, key=self.owner, digest_size=20).hexdigest() + ".block"

    def _count(self, file: str) -> None:
        """Know a whole file as the one used last; another process may have written it."""
        self._drop(file)
        self._files[file] = self._size
        self._bytes += self._size
        self._whole.add(file)

    def _drop(self, file: str) -> None:
        self._bytes -= self._files.pop(file, 0)
        self._whole.discard(file)

    def _forget(self, file: str) -> None:
        self._drop(file)
        with contextlib.suppress(OSError):  # a folder that became read-only fails no request
            (self.folder / file).unlink(missing_ok=True)


def digest(tensors: Iterable[tuple[str, Tensor]], *facts: object) -> bytes:
    """A digest of every byte of named tensors and of some facts. A gigabyte takes about a second."""
    total = hashlib.blake2b(repr(facts).encode(), digest_size=32)
    for name, tensor in tensors:
        total.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        total.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return total.digest()


def _bytes(tensor: Tensor) -> bytes:
    return tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
