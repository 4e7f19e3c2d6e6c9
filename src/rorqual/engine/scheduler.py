"""Who computes what in the next step. Plain Python, no tensors.

Running requests that decode come first, one token each, so a long prompt never holds them up; what is left of the
step's token budget goes to prompts, in chunks. Where the cache is full the last in order gives its blocks back and is
computed again later, before anyone who came after it.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Protocol

from rorqual.engine.blocks import BlockPool, Hash, block_hash
from rorqual.engine.config import EngineConfig
from rorqual.engine.sequence import Sequence
from rorqual.engine.speculative import propose


@dataclass(slots=True)
class Work:
    """`count` tokens of a sequence from `start`, to be computed in this step; guesses are among them."""

    sequence: Sequence
    start: int
    count: int

    @property
    def last(self) -> bool:
        """Whether the sequence's newest token is among them, so that the next one can be drawn."""
        return self.start + self.count >= len(self.sequence.tokens)

    @property
    def guesses(self) -> int:
        """How many of the tokens are guesses."""
        return max(0, self.start + self.count - len(self.sequence.tokens))


class BlockStore(Protocol):
    """Where full blocks are kept beyond the pool."""

    def load(self, name: Hash, block: int) -> bool:
        """Fill a block with what is kept under a name; False where there is nothing."""

    def save(self, name: Hash, block: int) -> None:
        """Keep a full block."""


class Scheduler:
    """Queues of waiting and running sequences over one pool of blocks."""

    def __init__(self, pool: BlockPool, config: EngineConfig, store: BlockStore | None = None) -> None:
        self.pool, self.config, self.store = pool, config, store
        self.waiting: list[Sequence] = []  # in order
        self.running: list[Sequence] = []  # in order
        self._preempted: set[Sequence] = set()  # in this step
        self.preemptions = 0
        self.hit_tokens = self.query_tokens = 0

    def add(self, sequence: Sequence) -> None:
        bisect.insort(self.waiting, sequence, key=lambda s: s.order)

    def remove(self, sequence: Sequence) -> None:
        """Take a sequence out, wherever it is, and release its blocks."""
        for queue in (self.waiting, self.running):
            if sequence in queue:
                queue.remove(sequence)
        self._release(sequence)

    def schedule(self) -> list[Work]:
        """The work of the next step; never empty while anything waits or runs."""
        budget = self.config.max_num_batched_tokens
        work: list[Work] = []
        self._preempted.clear()
        # decodes, then prompts under way, each in order, which is that of `running`
        decodes: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in self.running:
            (prompts if len(sequence.tokens) - sequence.computed > 1 else decodes).append(sequence)
        for sequence in (*decodes, *prompts):
            if budget == 0:
                break
            if sequence in self._preempted:
                continue  # by one before it
            count = self._count(sequence, budget)
            if not count:
                continue
            if (
                self.config.speculate
                and count == len(sequence.tokens) - sequence.computed == 1
                and not self.waiting
            ):
                count += self._guess(sequence, budget - 1 - self._left(sequence, work))
            if self._reserve(sequence, count, work):
                work.append(Work(sequence, sequence.computed, count))
                budget -= self._charge(sequence, count)
        while self.waiting and budget and len(self.running) < self.config.max_num_seqs:
            sequence = self.waiting[0]
            self._find_prefix(sequence)
            count = self._count(sequence, budget)
            if not count or not self._grow(sequence, count):
                self._release(sequence)
                break
            if sequence.cached_tokens is None:  # now, not at an attempt before: blocks come and go
                sequence.cached_tokens = min(sequence.computed, sequence.prompt_len)
                self.hit_tokens += sequence.cached_tokens
                self.query_tokens += sequence.prompt_len
            self.waiting.pop(0)
            bisect.insort(self.running, sequence, key=lambda s: s.order)
            work.append(Work(sequence, sequence.computed, count))
            budget -= self._charge(sequence, count)
        return work

    def _count(self, sequence: Sequence, budget: int) -> int:
        """How many tokens a sequence computes next. Where logits may not depend on neighbours: up to the next fixed place
        of its prompt or none, and what it has said itself one by one, as when it was said."""
        left = len(sequence.tokens) - sequence.computed
        if not self.config.batch_invariant:
            return min(left, budget)
        if sequence.computed >= sequence.prompt_len:
            return 1
        chunk = self.config.chunk
        count = min(chunk - sequence.computed % chunk, sequence.prompt_len - sequence.computed)
        return count if count <= budget else 0

    def _charge(self, sequence: Sequence, count: int) -> int:
        """What of the step's budget that is: with fixed chunks all of it is for prompts, or none would ever fit."""
        return 0 if self.config.batch_invariant and count == 1 else count

    def _left(self, sequence: Sequence, work: list[Work]) -> int:
        """Running sequences that have no work yet: each is sure of a token before anyone guesses."""
        return len(self.running) - len(work) - 1

    def _guess(self, sequence: Sequence, budget: int) -> int:
        """Set a decoding sequence's guesses and return their number."""
        room = sequence.max_tokens - sequence.generated - 1
        most = min(self.config.speculate, budget, room)
        if self.config.mtp:
            sequence.draft = sequence.guess[: max(most, 0)]
        else:
            sequence.draft = propose(sequence.tokens, most) if most > 0 else []
        return len(sequence.draft)

    def computed(self, work: Work, wrong: int = 0) -> None:
        """Note that a piece of work is in the cache, but for its last `wrong` guesses; full blocks become findable."""
        sequence, size = work.sequence, self.config.block_size
        sequence.computed = work.start + work.count - wrong
        sequence.draft = []
        if not self.config.prefix_cache:
            return
        reach = (
            sequence.computed
            if self.config.cache_completions
            else min(sequence.computed, sequence.prompt_len)
        )
        if self.config.batch_invariant:  # whole chunks of prompts alone are computed alike in every request
            reach = min(reach, sequence.prompt_len) // self.config.chunk * self.config.chunk
        full = reach // size
        self._name(sequence, full)
        while sequence.published < full:
            index = sequence.published
            self.pool.publish(sequence.blocks[index], sequence.hashes[index + 1])
            if self.store is not None:
                self.store.save(sequence.hashes[index + 1], sequence.blocks[index])
            sequence.published += 1

    def _reserve(self, sequence: Sequence, count: int, work: list[Work]) -> bool:
        """Blocks for the next `count` tokens, pre-empting from the end of the order; False if it was itself the last."""
        while not self._grow(sequence, count):
            victim = self.running[-1]
            self._preempt(victim)
            work[:] = [w for w in work if w.sequence is not victim]
            if victim is sequence:
                return False
        return True

    def _grow(self, sequence: Sequence, count: int) -> bool:
        need = -(-(sequence.computed + count) // self.config.block_size) - len(sequence.blocks)
        if need > self.pool.available:
            return False
        for _ in range(need):
            block = self.pool.allocate()
            assert block is not None
            sequence.blocks.append(block)
        return True

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        self._preempted.add(victim)
        victim.draft = []
        self._release(victim)
        victim.preemptions += 1
        self.preemptions += 1
        self.add(victim)

    def _release(self, sequence: Sequence) -> None:
        # the last block first: the beginning of a prompt is what others will look for, so it is evicted last
        for block in reversed(sequence.blocks):
            self.pool.release(block)
        sequence.blocks, sequence.computed, sequence.published = [], 0, 0
        sequence.guess = []

    def _find_prefix(self, sequence: Sequence) -> None:
        """Take over blocks that an earlier request computed; the last token is always computed anew."""
        size = self.config.block_size
        wanted = (len(sequence.tokens) - 1) // size
        if not self.config.prefix_cache or sequence.request.params.prompt_logprobs is not None:
            wanted = 0
        if self.config.batch_invariant:
            # What it said itself, others may have computed as their prompt, in chunks.
            wanted = min(wanted, sequence.prompt_len // self.config.chunk * self.config.chunk // size)
        self._name(sequence, wanted)
        for index in range(wanted):
            block = self.pool.find(sequence.hashes[index + 1])
            if block is None:
                block = self._fetch(sequence.hashes[index + 1])
            if block is None:
                break
            sequence.blocks.append(block)
        if self.config.batch_invariant:  # a part of a chunk would leave a rest that nobody computes like that
            for _ in range(len(sequence.blocks) % (self.config.chunk // size)):
                self.pool.release(sequence.blocks.pop())
        sequence.published = len(sequence.blocks)
        sequence.computed = len(sequence.blocks) * size

    def _fetch(self, name: Hash) -> int | None:
        """A block filled from the store, findable from now on."""
        if self.store is None:
            return None
        block = self.pool.allocate()
        if block is None:
            return None
        if not self.store.load(name, block):
            self.pool.release(block)
            return None
        self.pool.publish(block, name)
        return block

    def _name(self, sequence: Sequence, full: int) -> None:
        """Hash the first `full` blocks' tokens, as far as not done yet."""
        size = self.config.block_size
        while len(sequence.hashes) <= full:
            index = len(sequence.hashes) - 1
            tokens = sequence.tokens[index * size : (index + 1) * size]
            sequence.hashes.append(block_hash(sequence.hashes[-1], tokens))
