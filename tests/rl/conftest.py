"""Runs of a model of a few thousand parameters on small sums."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rorqual.rl.config import ColdStart, RLConfig, Sampling, TaskMix
from rorqual.train.shape import Shape


@pytest.fixture
def make_config(tmp_path: Path) -> Callable[..., RLConfig]:
    """Two layers, 32 wide, four experts; three supervised steps and three of reinforcement."""

    def make(**changes: Any) -> RLConfig:
        base: dict[str, Any] = {
            "out": tmp_path / "run",
            "shape": Shape(depth=2, width=32, heads=2, experts=4, experts_per_token=2),
            "tasks": (TaskMix(options={"terms": 2, "digits": 2}, difficulty=0),),
            "sampling": Sampling(prompts=4, group=4, max_tokens=6, max_prompt=10, refill=1),
            "cold_start": ColdStart(steps=3, batch=8, eval_every=2, warmup=2),
            "steps": 3,
            "updates": 2,
            "eval_every": 2,
            "eval_problems": 8,
            "pass_k": 2,
            "save_every": 2,
        }
        return RLConfig(**{**base, **changes})

    return make


class Silent:
    """A view that keeps what it is told, and can call back."""

    def __init__(self, then: Callable[[dict[str, Any]], None] = lambda line: None) -> None:
        self.lines: list[dict[str, Any]] = []
        self.said: list[str] = []
        self.then = then

    def update(self, line: Any) -> None:
        self.lines.append(dict(line))
        self.then(dict(line))

    def say(self, text: str) -> None:
        self.said.append(text)

    def close(self) -> None:
        pass


@pytest.fixture
def silent() -> Silent:
    return Silent()


@pytest.fixture
def make_view() -> type[Silent]:
    return Silent
