"""Batches out of built sets: packed rows, mixed by weight and stage, the same from the same seed.

Row k of an epoch of a set is tokens k*T to k*T + T of its documents laid end to end in that epoch's order, so any row
can be found without reading the ones before it: ranks take every world-th row, and a position in the data is a few
numbers. Rows are drawn in an order of their own: neighbours are often one long document, and a batch of them would
be a batch of one document.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from rorqual.data.shards import TokenSet
from rorqual.errors import ConfigError, DataError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Stage:
    """From `start` (a share of the training) on, rows are drawn from the sets by these weights."""

    start: float
    weights: tuple[float, ...]


@dataclass(frozen=True)
class LoaderConfig:
    """Which sets, in which proportions, when. Prose first and code and maths near the end, as DeepSeek's cool-down
    has it, is two stages."""

    sets: tuple[Path, ...] = ()
    stages: tuple[Stage, ...] = ()  # empty: every set by its number of tokens, all along
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sets:
            raise ConfigError("sets: name at least one folder made by `rorqual data build`")
        starts = [s.start for s in self.stages]
        if starts and (starts[0] != 0 or sorted(set(starts)) != starts or starts[-1] >= 1):
            raise ConfigError(f"stages start at {starts}: must begin at 0 and rise, below 1")
        for stage in self.stages:
            if len(stage.weights) != len(self.sets):
                raise ConfigError(
                    f"stage at {stage.start}: {len(stage.weights)} weights for {len(self.sets)} sets"
                )
            if min(stage.weights) < 0 or sum(stage.weights) <= 0:
                raise ConfigError(
                    f"stage at {stage.start}: weights={stage.weights}: must be 0 or more, one above 0"
                )


@dataclass(frozen=True)
class Batch:
    """ids, positions [B, T + 1] int64 and document_ids [B, T + 1] int32; positions begin again with each document."""

    ids: Tensor
    positions: Tensor
    document_ids: Tensor


class Rows:
    """The rows of one split of one set, epoch after epoch."""

    def __init__(self, tokens: TokenSet, seq_len: int, seed: int, shuffle: bool = True) -> None:
        self.tokens, self.seq_len, self.seed, self.shuffle = tokens, seq_len, seed, shuffle
        self.per_epoch = (tokens.tokens - 1) // seq_len
        if self.per_epoch < 1:
            raise DataError(
                f"the set has {tokens.tokens} tokens, not enough for one row of {seq_len + 1}; take a shorter one"
            )
        self._epoch: int | None = None
        self._order: NDArray[np.int64] = np.empty(0, np.int64)
        self._ends: NDArray[np.int64] = np.empty(0, np.int64)
        self._rows: NDArray[np.int64] = np.empty(0, np.int64)

    def row(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int32]]:
        """ids, positions and document numbers [T + 1] of a row counted over all epochs."""
        self._lay_out(number // self.per_epoch)
        start = int(self._rows[number % self.per_epoch]) * self.seq_len
        want = self.seq_len + 1
        ids = np.empty(want, np.int64)
        positions = np.empty(want, np.int64)
        documents = np.empty(want, np.int32)
        at, filled = int(np.searchsorted(self._ends, start, side="right")), 0
        first = at
        while filled < want:
            doc = self.tokens.document(int(self._order[at]))
            begin = max(0, start - (int(self._ends[at]) - len(doc)))
            n = min(len(doc) - begin, want - filled)
            ids[filled : filled + n] = doc[begin : begin + n]
            positions[filled : filled + n] = np.arange(begin, begin + n)
            documents[filled : filled + n] = at - first
            filled += n
            at += 1
        # a document that was begun in an earlier row is seen from here on only, so its positions begin here
        positions[documents == 0] -= positions[0]
        return ids, positions, documents

    def _lay_out(self, epoch: int) -> None:
        if epoch == self._epoch:
            return
        count = len(self.tokens)
        order, rows = np.arange(count), np.arange(self.per_epoch)
        if self.shuffle:
            generator = np.random.default_rng([self.seed, epoch])
            order, rows = generator.permutation(order), generator.permutation(rows)
        self._order = order[self.tokens.lengths[order] > 0]
        self._ends, self._rows = np.cumsum(self.tokens.lengths[self._order]), rows
        self._epoch = epoch


class Loader:
    """An endless iterator of batches for one rank; `total_steps` is what the stages' shares refer to."""

    def __init__(
        self,
        config: LoaderConfig,
        batch_size: int,
        seq_len: int,
        total_steps: int = 1,
        rank: int = 0,
        world: int = 1,
        vocab_size: int | None = None,
        verify: bool = False,
    ) -> None:
        if batch_size < 1 or seq_len < 1 or not 0 <= rank < world:
            raise ConfigError(
                f"batch_size={batch_size}, seq_len={seq_len}, rank={rank} of {world}: out of range"
            )
        sets = [TokenSet(Path(s), "train", verify) for s in config.sets]
        sizes = {s.vocab_size for s in sets} | ({vocab_size} if vocab_size is not None else set())
        if len(sizes) > 1 and (
            len({s.vocab_size for s in sets}) > 1 or sets[0].vocab_size > (vocab_size or 0)
        ):
            raise DataError(
                f"vocabularies of {sorted(sizes)} tokens: sets and model must share one tokenizer"
            )
        self.config, self.batch_size, self.seq_len = config, batch_size, seq_len
        self.total_steps, self.rank, self.world = max(total_steps, 1), rank, world
        self.rows = [Rows(s, seq_len, config.seed + 1000 * i) for i, s in enumerate(sets)]
        self._natural = tuple(float(s.tokens) for s in sets)
        self.step = 0
        self.drawn = [0] * len(sets)  # rows of each set that all ranks together have taken

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> Batch:
        import torch

        weights = self._weights()
        mine = []
        for row in range(self.batch_size * self.world):
            source = self._choose(weights)
            number = self.drawn[source]
            self.drawn[source] += 1
            if row % self.world == self.rank:
                mine.append(self.rows[source].row(number))
        self.step += 1
        ids, positions, documents = (torch.from_numpy(np.stack(x)) for x in zip(*mine, strict=True))
        return Batch(ids, positions, documents)

    def state_dict(self) -> dict[str, Any]:
        """The position: the same for every rank, a few numbers."""
        return {
            "step": self.step,
            "drawn": list(self.drawn),
            "batch_size": self.batch_size * self.world,
            "seq_len": self.seq_len,
            "seed": self.config.seed,
            "sets": [rows.tokens.fingerprint for rows in self.rows],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position. The number of ranks may have changed while the batch of all of them has not.

        Raises ConfigError where batch, row length, seed or the number of sets differ, DataError where the tokens do:
        samples would be lost or repeated, or ids mean something else.
        """
        own = self.state_dict()
        for key in ("batch_size", "seq_len", "seed"):
            if state[key] != own[key]:
                raise ConfigError(
                    f"loader {key}={own[key]}: the saved position has {state[key]}; keep it, or start anew"
                )
        if len(state["drawn"]) != len(self.drawn):
            raise ConfigError(f"loader: {len(self.drawn)} sets, the saved position has {len(state['drawn'])}")
        for folder, ours, saved in zip(
            self.config.sets, own["sets"], state.get("sets", own["sets"]), strict=True
        ):
            if ours != saved:
                raise DataError(
                    f"{Path(folder).resolve()}: not the tokens of the saved position, the set was built again; "
                    "put the old one back, or start another run folder"
                )
        self.step, self.drawn = int(state["step"]), [int(n) for n in state["drawn"]]

    def _weights(self) -> tuple[float, ...]:
        share = self.step / self.total_steps
        stages = [s for s in self.config.stages if s.start <= share]
        weights = stages[-1].weights if stages else self._natural
        total = sum(weights)
        return tuple(w / total for w in weights)

    def _choose(self, weights: Sequence[float]) -> int:
        """The set for the next row: a hash of how many rows were drawn, so that any order of ranks agrees."""
        if len(weights) == 1:
            return 0
        point = np.random.default_rng([self.config.seed, 77, sum(self.drawn)]).random()
        return min(int(np.searchsorted(np.cumsum(weights), point, side="right")), len(weights) - 1)


def heldout_batches(
    folder: Path, batch_size: int, seq_len: int, limit_rows: int | None = None
) -> Sequence[Batch]:
    """The held-out rows of a set in order, in batches (the last may be smaller), spread over all of it where limited."""
    import torch

    rows = Rows(TokenSet(folder, "heldout"), seq_len, seed=0, shuffle=False)
    count = rows.per_epoch if limit_rows is None else min(rows.per_epoch, limit_rows)
    numbers = np.linspace(0, rows.per_epoch - 1, count).astype(int)
    out = []
    for start in range(0, count, batch_size):
        found = [rows.row(int(n)) for n in numbers[start : start + batch_size]]
        out.append(Batch(*(torch.from_numpy(np.stack(x)) for x in zip(*found, strict=True))))
    return out
