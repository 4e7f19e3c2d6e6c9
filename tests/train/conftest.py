"""A token set of a few kilobytes and models of a few thousand parameters."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rorqual.device import Limits
from rorqual.train.config import TrainConfig
from rorqual.train.shape import Shape


@pytest.fixture(autouse=True)
def known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's peak is not measured anew for every run of three steps."""
    monkeypatch.setattr("rorqual.train.run.measure_limits", lambda _: Limits(1e10, 1e11, 2e11))


@pytest.fixture
def make_config(token_set: Path, tmp_path: Path) -> Callable[..., TrainConfig]:
    """A run of two layers, 32 wide, in float32, with experts and one MTP module."""

    def make(shape: dict[str, Any] | None = None, **changes: Any) -> TrainConfig:
        small = {"depth": 2, "width": 32, "heads": 2, "experts": 4, "experts_per_token": 2, "mtp": 1}
        base: dict[str, Any] = {
            "out": tmp_path / "run",
            "data": (token_set,),
            "shape": Shape(**(small if shape is None else shape)),
            "steps": 8,
            "batch_size": 2,
            "seq_len": 32,
            "dtype": "float32",
            "device": "cpu",
            "eval_every": 0,
            "eval_rows": 4,
            "sample_every": 0,
            "save_every": 0,
        }
        return TrainConfig(**{**base, **changes})

    return make


class Silent:
    """A view that keeps what it is told."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []
        self.said: list[str] = []

    def update(self, line: Any) -> None:
        self.lines.append(dict(line))

    def say(self, text: str) -> None:
        self.said.append(text)

    def close(self) -> None:
        pass


@pytest.fixture
def silent() -> Silent:
    return Silent()
