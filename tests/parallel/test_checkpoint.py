"""Checkpoints move between any numbers of processes, exactly."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from rorqual.checkpoint import hf
from rorqual.checkpoint.convert import convert
from rorqual.checkpoint.inspect import inspect
from rorqual.checkpoint.pieces import Pieces
from rorqual.checkpoint.tensors import TensorFile
from rorqual.errors import CheckpointError
from rorqual.train import checkpoint

SHAPE = {
    "depth": 2,
    "width": 32,
    "heads": 4,
    "experts": 12,
    "experts_per_token": 2,
    "mtp": 1,
    "zero_output": False,
}
TIED = {
    "family": "llama",
    "depth": 2,
    "width": 32,
    "heads": 6,
    "tie_word_embeddings": True,
    "zero_output": False,
}
TIED |= {"width": 24, "heads": 6}
WAYS = [
    (1, {}),
    (2, {"shard": True}),
    (3, {"shard": True, "expert": 3}),
    (4, {"expert": 2}),
    (2, {"tensor": 2}),
]

Run = Callable[..., list[Any]]


def state(folder: Path) -> dict[str, torch.Tensor]:
    """Weights, moments and all else of a checkpoint."""
    weights, saved = checkpoint.restore(folder, hf.load_config(folder))
    return {**weights, **saved.tensors}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        assert torch.equal(tensor, b[name]), name


@pytest.mark.parametrize("shape", [SHAPE, TIED], ids=["experts", "tied"])
def test_moved_through_every_number_of_processes(team: Run, tmp_path: Path, shape: dict[str, Any]) -> None:
    """Saved by two; loaded and saved again by one, three, four, two: nothing changes, moments included."""
    ways = WAYS if shape is SHAPE else [(1, {}), (2, {"tensor": 2}), (3, {"shard": True}), (4, {})]
    out = str(tmp_path / "run")
    (folder, _) = team(2, "begin_and_save", out=out, shape=shape, parallel={"shard": True}, steps=2)
    first = state(Path(folder))
    for world, parallel in ways:
        moved = team(world, "begin_and_save", out=out, shape=shape, parallel=parallel, steps=0)
        assert {Path(f) for f in moved} == {Path(folder)}
        assert_same(state(Path(folder)), first)
        for each in team(world, "resumed", folder=folder, shape=shape, parallel=parallel):
            assert each["step"] == each["position"]["step"] == 2
            for name, tensor in each["tensors"].items():
                assert torch.equal(tensor, first[name]), name


@pytest.mark.parametrize(("world", "parallel"), WAYS[1:], ids=["shard", "both", "expert", "tensor"])
def test_a_resumed_run_equals_one_that_went_through(
    team: Run, tmp_path: Path, world: int, parallel: dict[str, Any]
) -> None:
    """To the bit, with the same number of processes."""
    run = {"shape": SHAPE, "parallel": parallel}
    whole = team(world, "begin_and_save", out=str(tmp_path / "a"), steps=4, **run)
    for _ in range(2):
        stopped = team(world, "begin_and_save", out=str(tmp_path / "b"), steps=2, **run)
    assert_same(state(Path(whole[0])), state(Path(stopped[0])))


def test_it_is_a_model_folder(team: Run, tmp_path: Path) -> None:
    """A checkpoint in parts loads like any other, and is exported to Hugging Face's layout."""
    run = {"shape": SHAPE, "parallel": {"expert": 2, "shard": True}}
    (folder, *_) = team(4, "begin_and_save", out=str(tmp_path / "run"), steps=1, **run)
    assert len(list((Path(folder) / "pieces").iterdir())) == 4
    convert(Path(folder), tmp_path / "exported")
    names = json.dumps([p.name for p in (tmp_path / "exported").iterdir()])
    assert "model.safetensors" in names
    ours, theirs = hf.load_model(Path(folder)), hf.load_model(tmp_path / "exported")
    assert_same(ours.state_dict(), theirs.state_dict())


def test_a_model_of_another_shape_is_refused(team: Run, tmp_path: Path) -> None:
    """Missing, unexpected and mis-shaped tensors, all at once; `rorqual inspect` says the same."""
    run = {"shape": SHAPE, "parallel": {"shard": True}}
    (folder, *_) = team(2, "begin_and_save", out=str(tmp_path / "run"), steps=1, **run)
    assert inspect(Path(folder)).problems == []
    assert inspect(Path(folder)).facts["files"] == 2
    tree = json.loads((Path(folder) / "config.json").read_text())
    (Path(folder) / "config.json").write_text(json.dumps(tree | {"n_shared_experts": 0, "vocab_size": 128}))
    with pytest.raises(
        CheckpointError, match=r"unexpected: .*shared_experts.*embed_tokens.weight is \(64, 32\)"
    ):
        hf.load_model(Path(folder))
    assert "unexpected" in inspect(Path(folder)).problems[0]


def test_values_that_are_not_finite_are_refused(team: Run, tmp_path: Path) -> None:
    run = {"shape": SHAPE, "parallel": {"shard": True}}
    (folder, *_) = team(2, "begin_and_save", out=str(tmp_path / "run"), steps=1, **run)
    path = next((Path(folder) / "pieces").iterdir())
    file = TensorFile(path)
    at = file.entries["model.norm.weight"].start
    path.write_bytes(path.read_bytes()[:at] + b"\x00\x00\xc0\x7f" + path.read_bytes()[at + 4 :])
    with pytest.raises(CheckpointError, match=r"norm\.weight has values that are NaN"):
        hf.load_model(Path(folder))


def test_a_part_that_is_missing_is_named(team: Run, tmp_path: Path) -> None:
    run = {"shape": SHAPE, "parallel": {"shard": True}}
    (folder, *_) = team(2, "begin_and_save", out=str(tmp_path / "run"), steps=1, **run)
    lost = next((Path(folder) / "pieces").glob("rank-00001*"))
    kept = lost.read_bytes()
    lost.unlink()
    with pytest.raises(CheckpointError, match=lost.name):
        hf.load_model(Path(folder))
    assert lost.name in next(checkpoint.damage(Path(folder)))
    lost.write_bytes(kept[:-1] + bytes([kept[-1] ^ 1]))
    assert "checksum" in next(checkpoint.damage(Path(folder)))


def test_values_that_two_files_hold_are_refused(team: Run, tmp_path: Path) -> None:
    """Two files that both say they hold the first half."""
    run = {"shape": SHAPE, "parallel": {"shard": True}}
    (folder, *_) = team(2, "begin_and_save", out=str(tmp_path / "run"), steps=1, **run)
    _, second = sorted((Path(folder) / "pieces").iterdir())
    bytes_ = second.read_bytes()
    name = "model.embed_tokens.weight"
    at = Pieces(Path(folder) / "pieces").parts[name][1].start
    assert at == (32, 0)
    said = b'\\"start\\": [32, 0]'
    assert said in bytes_
    second.write_bytes(bytes_.replace(said, b'\\"start\\": [ 0, 0]'))
    with pytest.raises(CheckpointError, match="both hold values of model"):
        hf.load_model(Path(folder))


def test_a_full_disk_costs_the_checkpoint_and_not_the_one_before(team: Run, tmp_path: Path) -> None:
    run = {"shape": SHAPE, "parallel": {"shard": True}}
    (folder, *_) = team(2, "begin_and_save", out=str(tmp_path / "run"), steps=1, **run)
    before = state(Path(folder))
    said = team(2, "fail_to_save", out=str(tmp_path / "run"), **run)
    assert all("cannot be written" in each for each in said), said
    assert_same(state(Path(folder)), before)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir() if not p.name.startswith(".")] == [
        "step-00000001"
    ]


def test_every_process_finds_its_rows_again(team: Run, token_set: Path) -> None:
    """pytorch/torchtitan#409: not the first process's alone."""
    found = team(2, "orders", data=str(token_set), steps=6, stop=3)
    for each in found:
        assert all(torch.equal(a, b) for a, b in zip(each["straight"], each["resumed"], strict=True))
    assert not torch.equal(found[0]["straight"][0], found[1]["straight"][0])
