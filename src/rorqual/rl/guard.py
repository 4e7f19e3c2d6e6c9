"""Collapse, seen early: hardly a group has anything to teach any more, and not because all answers are right."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rorqual.rl.config import Guard


@dataclass
class Watch:
    """Running means of reward and live groups, and the best reward so far; saved with the run."""

    config: Guard
    reward: float | None = None
    live: float | None = None
    best: float = 0.0
    trips: int = 0
    share: float = 1.0  # of the full rate

    def collapsed(self, reward: float, live: float) -> bool:
        """Take a step's figures; whether the run has collapsed."""
        keep = self.config.memory
        self.reward = reward if self.reward is None else keep * self.reward + (1 - keep) * reward
        self.live = live if self.live is None else keep * self.live + (1 - keep) * live
        self.best = max(self.best, self.reward)
        return self.live < self.config.live and self.reward < self.config.fall * self.best

    def went_back(self) -> None:
        """Begin the means anew, at a lower rate."""
        self.reward = self.live = None
        self.trips += 1
        self.share *= self.config.slower

    @property
    def healthy(self) -> bool:
        """Whether the reward is near its best: a checkpoint from now is worth going back to."""
        return self.reward is not None and self.reward >= 0.95 * self.best

    def state_dict(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "config"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name])
