"""Examples packed into rows, epoch after epoch: a source of batches like the loader, for fine-tuning."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rorqual.errors import ConfigError, DataError
from rorqual.train.chat import Example


@dataclass(frozen=True)
class PackedRows:
    """ids, positions, document_ids [B, T + 1] as the loader's; loss_mask [B, T + 1]: 1 where a token is to be learnt."""

    ids: Tensor
    positions: Tensor
    document_ids: Tensor
    loss_mask: Tensor


class Packs:
    """An endless iterator. Examples of an epoch are shuffled and laid into rows, each in the first that has room; one
    that is longer than a row is cut, and left out where nothing to learn remains."""

    def __init__(
        self, found: Sequence[Example], batch_size: int, seq_len: int, seed: int, pad: int = 0
    ) -> None:
        self.room = seq_len + 1
        cut = [Example(e.ids[: self.room], e.mask[: self.room]) for e in found]
        self.examples = [e for e in cut if any(e.mask[1:])]
        self.shortened = sum(len(e.ids) > self.room for e in found)
        if not self.examples:
            raise DataError(
                f"none of {len(found)} examples has an answer within seq_len={seq_len} tokens; raise it"
            )
        self.batch_size, self.seq_len, self.seed, self.pad = batch_size, seq_len, seed, pad
        sha256 = hashlib.sha256()
        for e in self.examples:
            sha256.update(array("q", e.ids).tobytes() + bytes(e.mask))
        self.digest = sha256.hexdigest()
        self.epoch = self.row = 0
        self._rows = self._lay_out()

    @property
    def rows_per_epoch(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Packs:
        return self

    def __next__(self) -> PackedRows:
        rows = []
        for _ in range(self.batch_size):
            if self.row == len(self._rows):
                self.epoch, self.row = self.epoch + 1, 0
                self._rows = self._lay_out()
            rows.append(self._rows[self.row])
            self.row += 1
        return self.batch(rows)

    def in_order(self) -> list[PackedRows]:
        """One epoch in batches, the last perhaps smaller."""
        starts = range(0, len(self._rows), self.batch_size)
        return [self.batch(self._rows[i : i + self.batch_size]) for i in starts]

    def batch(self, rows: Sequence[Sequence[int]]) -> PackedRows:
        """The batch of rows, each a list of example numbers."""
        shape = (len(rows), self.room)
        ids = torch.full(shape, self.pad)
        positions, documents = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.int32)
        mask = torch.zeros(shape)
        for r, numbers in enumerate(rows):
            at = 0
            for document, number in enumerate(numbers):
                example = self.examples[number]
                span = slice(at, at + len(example.ids))
                ids[r, span] = torch.tensor(example.ids)
                positions[r, span] = torch.arange(len(example.ids))
                documents[r, span] = document
                mask[r, span] = torch.tensor(example.mask, dtype=torch.float32)
                at += len(example.ids)
            documents[r, at:] = len(numbers)
            positions[r, at:] = torch.arange(self.room - at)
        return PackedRows(ids, positions, documents, mask)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it depends on."""
        own = {"batch_size": self.batch_size, "seq_len": self.seq_len, "seed": self.seed}
        return {
            "epoch": self.epoch,
            "row": self.row,
            "examples": len(self.examples),
            "sha256": self.digest,
            **own,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a position; raises ConfigError where it belongs to other data or settings."""
        own = self.state_dict()
        for key in ("batch_size", "seq_len", "seed", "examples"):
            if state[key] != own[key]:
                raise ConfigError(
                    f"{key}={own[key]}: the saved position has {state[key]}; keep it, or start anew"
                )
        if state.get("sha256", self.digest) != self.digest:
            raise DataError(
                "the conversations are not those of the saved position: their files, the template or the tokenizer have "
                "changed; bring them back, or start anew"
            )
        self.epoch, self.row = int(state["epoch"]), int(state["row"])
        self._rows = self._lay_out()

    def _lay_out(self) -> list[list[int]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        rows: list[list[int]] = []
        room: list[int] = []
        first = 0  # rows before it are full
        for number in torch.randperm(len(self.examples), generator=generator).tolist():
            size = len(self.examples[number].ids)
            place = next((i for i in range(first, len(rows)) if room[i] >= size), None)
            if place is None:
                rows.append([])
                room.append(self.room)
                place = len(rows) - 1
            rows[place].append(number)
            room[place] -= size
            first = max(first, len(rows) - 64)  # a window keeps it linear
        return rows
