"""A token set of a few kilobytes and models of a few thousand parameters."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rorqual.data.bpe import train_bpe, write_tokenizer
from rorqual.data.shards import ShardWriter, describe
from rorqual.device import Limits
from rorqual.text.tokenizer import Tokenizer
from rorqual.train.config import TrainConfig
from rorqual.train.shape import Shape

TEXTS = [
    f"def add_{i}(a, b):\n    total = a + b + {i}\n    return total\n\n\nclass Box{i}:\n    size = {i * 7}\n"
    for i in range(60)
]


@pytest.fixture(autouse=True)
def known_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's peak is not measured anew for every run of three steps."""
    monkeypatch.setattr("rorqual.train.run.measure_limits", lambda _: Limits(1e10, 1e11, 2e11))


@pytest.fixture(scope="session")
def token_set(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A built folder: 56 documents to train on, 4 held out."""
    folder = tmp_path_factory.mktemp("set")
    write_tokenizer(folder, train_bpe(TEXTS, 300))
    tokenizer = Tokenizer.load(folder)
    splits: dict[str, Any] = {}
    for split, texts in (("train", TEXTS[:56]), ("heldout", TEXTS[56:])):
        writer = ShardWriter(folder / split, tokenizer.vocab_size)
        for text in texts:
            ids = [tokenizer.bos_id, *tokenizer.encode(text, add_bos=False), tokenizer.eos_ids[0]]
            writer.add(ids, len(text.encode()))
        splits[split] = describe(writer.close())
    meta = {
        "vocab_size": tokenizer.vocab_size,
        "dtype": "uint16",
        "splits": splits,
        "config": {"sources": ["python"]},
    }
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


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
