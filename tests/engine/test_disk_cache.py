"""Blocks on disk: found after a restart, exact, whole or absent, never another model's, never a request's end."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rorqual.engine import quantize
from rorqual.engine.config import EngineConfig
from rorqual.engine.engine import Engine
from rorqual.engine.request import Request, SamplingParams
from rorqual.errors import ConfigError
from rorqual.model.transformer import Transformer

PROMPT = torch.randint(0, 96, (50,), generator=torch.Generator().manual_seed(1)).tolist()


def engine(model: Transformer, folder: Path | None, **changes: object) -> Engine:
    return Engine(
        model, config=EngineConfig(**{"block_size": 4, "cache_tokens": 256, "disk_cache": folder, **changes})
    )


def ask(e: Engine, prompt: list[int] = PROMPT, salt: str = "") -> tuple[list[int], list[float], int]:
    """(tokens, log-probabilities, cached tokens) of a request."""
    e.add(Request("r", prompt, SamplingParams(max_tokens=6, temperature=0, logprobs=0), cache_salt=salt))
    tokens, scores, cached = [], [], 0
    while e.has_work():
        for d in e.step():
            assert d.error is None
            tokens += d.token_ids
            scores += [p.logprob for p in d.logprobs]
            cached = d.cached_tokens
    e.check()
    return tokens, scores, cached


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.block"))


@pytest.mark.parametrize("kind", ["mla", "gqa", "quantised"])
def test_row_55_a_restarted_engine_finds_what_another_wrote(
    kind: str, fresh: Callable[[str, int], Transformer], tmp_path: Path
) -> None:
    def model() -> Transformer:
        made = fresh("mla" if kind == "quantised" else kind, 1)
        return quantize.quantize(made, quantize.formats(made, 8)) or made if kind == "quantised" else made

    first = engine(model(), tmp_path)
    assert ask(first)[2] == 0
    assert len(files(tmp_path)) == (50 + 5) // 4
    from_memory = ask(first)
    again = engine(model(), tmp_path)
    assert ask(again) == from_memory
    assert from_memory[2] == 48
    assert again.stats().prefix_hit_tokens == 48


def test_evicted_from_memory_it_is_still_on_disk(model: Transformer, tmp_path: Path) -> None:
    e = engine(model, tmp_path, cache_tokens=80)
    ask(e)
    ask(e, PROMPT[::-1])  # takes the blocks
    assert ask(e)[2] == 48


@pytest.mark.parametrize("other", ["weights", "dtype", "block_size", "salt"])
def test_what_another_made_is_not_found(
    other: str, fresh: Callable[[str, int], Transformer], tmp_path: Path
) -> None:
    ask(engine(fresh("mla", 1), tmp_path))
    changed = {"dtype": {"cache_dtype": "bfloat16"}, "block_size": {"block_size": 8}}.get(other, {})
    e = engine(fresh("mla", 2 if other == "weights" else 1), tmp_path, **changed)
    assert ask(e, salt="b" if other == "salt" else "")[2] == 0


def test_new_weights_leave_the_disk_alone(fresh: Callable[[str, int], Transformer], tmp_path: Path) -> None:
    e = engine(fresh("mla", 1), tmp_path)
    ask(e)
    before = files(tmp_path)
    e.update_weights(dict(fresh("mla", 2).state_dict()))
    assert ask(e)[2] == 0
    assert files(tmp_path) == before


@pytest.mark.parametrize("damage", ["short", "flipped", "empty"])
def test_a_damaged_block_is_a_miss_and_goes(damage: str, model: Transformer, tmp_path: Path) -> None:
    tokens, _, _ = ask(engine(model, tmp_path))
    for path in files(tmp_path):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes({"short": data[:-3], "flipped": data, "empty": b""}[damage])
    e = engine(model, tmp_path)
    assert ask(e)[::2] == (tokens, 0)
    assert ask(engine(model, tmp_path))[::2] == (tokens, 48)  # written anew


def test_the_folder_stays_within_its_limit_and_the_least_used_go(model: Transformer, tmp_path: Path) -> None:
    ask(engine(model, tmp_path))
    size = files(tmp_path)[0].stat().st_size
    for i, path in enumerate(files(tmp_path)):
        os.utime(path, (i, i))
    e = engine(model, tmp_path, disk_cache_bytes=5 * size)
    ask(e, PROMPT[::-1])
    assert len(files(tmp_path)) == 5
    assert sum(f.stat().st_size for f in tmp_path.iterdir()) <= 5 * size


def test_what_another_process_writes_and_removes_is_counted_right(model: Transformer, tmp_path: Path) -> None:
    a, b = engine(model, tmp_path), engine(model, tmp_path)
    ask(a)
    assert ask(b)[2] == 48
    stores = [a.scheduler.store, b.scheduler.store]
    assert {s._bytes for s in stores} == {sum(f.stat().st_size for f in files(tmp_path))}
    for path in files(tmp_path):
        path.unlink()
    for e in (a, b):
        e.pool.forget_all()
    assert ask(a)[2] == 0
    assert len(files(tmp_path)) == (50 + 5) // 4  # written again
    assert stores[0]._bytes == sum(f.stat().st_size for f in files(tmp_path))


def test_a_disk_that_takes_nothing_fails_no_request(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e = engine(model, tmp_path)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    assert ask(e)[0] == ask(engine(model, None))[0]
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_is_refused_before_work(model: Transformer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="disk_cache_bytes=10: one block"):
        engine(model, tmp_path, disk_cache_bytes=10)
    with pytest.raises(ConfigError, match="contradicts prefix_cache=False"):
        engine(model, tmp_path, prefix_cache=False)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ConfigError, match="cannot be used"):
        engine(model, tmp_path / "file")


def test_what_a_killed_process_left_half_written_goes(model: Transformer, tmp_path: Path) -> None:
    old, new = tmp_path / "a.block.1.tmp", tmp_path / "b.block.2.tmp"
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    engine(model, tmp_path)
    assert not old.exists()
    assert new.exists()  # perhaps another process is at it


def test_a_damaged_block_that_cannot_be_removed_is_a_miss(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = ask(engine(model, tmp_path))[0]
    for path in files(tmp_path):
        path.write_bytes(b"")
    e = engine(model, tmp_path)

    def refused(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refused)
    assert ask(e)[::2] == (tokens, 0)
