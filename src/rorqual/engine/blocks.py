"""Cache blocks: who holds which, which can be shared, which may be forgotten. Numbers only, no tensors.

A full block is known by the hash of all tokens up to its end (and of a salt), so a later request with the same
beginning finds it. Blocks that nobody holds stay findable until they are the least recently used and room is needed.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

Hash = bytes


def block_hash(parent: Hash, tokens: Sequence[int]) -> Hash:
    """The name of a full block: a hash of its parent's name and its tokens."""
    digest = hashlib.blake2b(parent, digest_size=16)
    digest.update(b",".join(b"%d" % t for t in tokens))
    return digest.digest()


def root_hash(salt: str) -> Hash:
    """The parent of a first block; requests with different salts share nothing."""
    return hashlib.blake2b(salt.encode(), digest_size=16).digest()


class BlockPool:
    """`total` blocks with reference counts. A block is free, held (count > 0), or idle: findable but evictable."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._free = list(range(total - 1, -1, -1))
        self._count = [0] * total
        self._by_hash: dict[Hash, int] = {}
        self._hash: dict[int, Hash] = {}
        self._idle: OrderedDict[int, None] = OrderedDict()  # least recently used first

    @property
    def available(self) -> int:
        """Blocks that `allocate` could give now."""
        return len(self._free) + len(self._idle)

    @property
    def used(self) -> int:
        """Blocks that requests hold."""
        return self.total - self.available

    def allocate(self) -> int | None:
        """A block of one's own, evicting the least recently used idle one; None where all are held."""
        if self._free:
            block = self._free.pop()
        elif self._idle:
            block, _ = self._idle.popitem(last=False)
            del self._by_hash[self._hash.pop(block)]
        else:
            return None
        self._count[block] = 1
        return block

    def find(self, name: Hash) -> int | None:
        """A block known by this hash, held once more; None where there is none."""
        block = self._by_hash.get(name)
        if block is not None:
            self._idle.pop(block, None)
            self._count[block] += 1
        return block

    def publish(self, block: int, name: Hash) -> None:
        """Make a full, computed block findable; the first one of its name is kept."""
        if name not in self._by_hash and block not in self._hash:
            self._by_hash[name] = block
            self._hash[block] = name

    def release(self, block: int) -> None:
        """Give up one hold. A findable block becomes idle, another free."""
        assert self._count[block] > 0, f"block {block} released once too often"
        self._count[block] -= 1
        if self._count[block] == 0:
            if block in self._hash:
                self._idle[block] = None
            else:
                self._free.append(block)

    def forget_all(self) -> None:
        """Make nothing findable any more; holds stay."""
        self._free.extend(self._idle)
        self._idle.clear()
        self._by_hash.clear()
        self._hash.clear()

    def check(self) -> None:
        """Assert that every block is in exactly one state and every name points both ways."""
        free, idle = set(self._free), set(self._idle)
        held = {b for b in range(self.total) if self._count[b] > 0}
        assert len(self._free) == len(free)
        assert not free & idle and not free & held and not idle & held  # noqa: PT018
        assert free | idle | held == set(range(self.total))
        assert idle <= set(self._hash)
        assert {n: b for b, n in self._hash.items()} == self._by_hash
