"""What a step learns from: a loader's batch with a weight for every target."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rorqual.model.attend import Causal


class Rows(Protocol):
    """ids, positions and document_ids [B, T + 1]: `rorqual.data.loader.Batch` is one."""

    @property
    def ids(self) -> Tensor: ...
    @property
    def positions(self) -> Tensor: ...
    @property
    def document_ids(self) -> Tensor: ...


@dataclass(frozen=True)
class Lesson:
    """ids [B, T + 1]; positions [B, T]; documents [B, T], or None where rows are one document each; weights [B, T] of
    the targets ids[:, 1:], 0 where a target does not count."""

    ids: Tensor
    positions: Tensor
    documents: Tensor | None
    weights: Tensor

    @classmethod
    def of(cls, rows: Rows, masks: bool) -> Lesson:
        """With `masks`, tokens see and predict their own document only."""
        own = getattr(rows, "loss_mask", None)  # [B, T + 1]: which tokens are worth predicting
        same = rows.document_ids[:, 1:] == rows.document_ids[:, :-1]
        weights = same.float() if masks else torch.ones_like(same, dtype=torch.float32)
        if own is not None:
            weights = weights * own[:, 1:]
        positions = rows.positions if masks else torch.arange(rows.ids.shape[1]).expand_as(rows.ids)
        return cls(rows.ids, positions[:, :-1], rows.document_ids[:, :-1] if masks else None, weights)

    @property
    def inputs(self) -> Tensor:
        return self.ids[:, :-1]

    @property
    def targets(self) -> Tensor:
        return self.ids[:, 1:]

    def attend(self, length: int | None = None) -> Causal:
        """Causal attention over the first `length` positions."""
        return Causal(None if self.documents is None else self.documents[:, :length].contiguous())

    def to(self, device: torch.device) -> Lesson:
        documents = None if self.documents is None else self.documents.to(device)
        return Lesson(self.ids.to(device), self.positions.to(device), documents, self.weights.to(device))
