"""What people really point us at: one line that names the fault and the cure, exit code 2, nothing half-written."""

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from rorqual.checkpoint.tensors import TensorFile
from rorqual.errors import CheckpointError

Break = Callable[[Path], Path | None]


def header(folder: Path) -> tuple[dict, bytes]:
    data = (folder / "model.safetensors").read_bytes()
    (n,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + n]), data[8 + n :]


def write(folder: Path, tree: dict, body: bytes) -> None:
    text = json.dumps(tree).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)


def truncate(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def shorten_to_five_bytes(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"short")


def huge_header(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")


def header_is_not_json(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 4) + b"\xff{{{" + b"0" * 64)


def lying_offsets(folder: Path) -> None:
    tree, body = header(folder)
    tree["lm_head.weight"]["data_offsets"][1] += 4
    write(folder, tree, body)


def overlapping(folder: Path) -> None:
    tree, body = header(folder)
    tree["model.norm.weight"]["data_offsets"] = [0, 192]
    write(folder, tree, body)


def unknown_dtype(folder: Path) -> None:
    tree, body = header(folder)
    tree["model.norm.weight"]["dtype"] = "F4"
    write(folder, tree, body)


def bytes_after_the_end(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x" * 16)


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}})
    )


def index_escapes(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"weight_map": {"lm_head.weight": "../model/model.safetensors"}})
    )


def bad_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text('{"weights": 1}')


def unknown_key(folder: Path) -> None:
    tree = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**tree, "attn_logit_gain": 2}))


def config_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    (folder / "model.safetensors").unlink()

    class Bomb:
        def __reduce__(self) -> tuple:
            return (open, (str(folder / "exploded"), "w"))

    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def big_vocabulary(folder: Path) -> None:
    vocab = {f"t{i}": i for i in range(200)}
    tree = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": None,
        "decoder": None,
        "normalizer": None,
        "post_processor": None,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "t0"},
    }
    (folder / "tokenizer.json").write_text(json.dumps(tree))


def hostile_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{% for")


CASES: list[tuple[Callable[[Path], None], str]] = [
    (truncate, "damaged"),
    (shorten_to_five_bytes, "too short"),
    (huge_header, "exceeds the file"),
    (header_is_not_json, "not JSON"),
    (lying_offsets, "lm_head.weight"),
    (overlapping, "damaged"),
    (unknown_dtype, "dtype 'F4'"),
    (bytes_after_the_end, "after the last tensor"),
    (missing_shard, "model-00001-of-00002.safetensors, which is not there"),
    (index_escapes, "which is not there"),
    (bad_index, "weight_map"),
    (unknown_key, "attn_logit_gain=2"),
    (config_not_json, "not valid JSON"),
    (no_weights, "no weights"),
    (pickled, "pickle"),
    (big_vocabulary, "tokenizer.json has 200 tokens, config.json vocab_size=160"),
    (hostile_template, "not a valid jinja2 template"),
]


@pytest.mark.parametrize(("spoil", "message"), CASES, ids=[c[0].__name__ for c in CASES])
def test_a_damaged_folder(saved: Path, run, capsys: pytest.CaptureFixture[str], spoil, message: str) -> None:
    spoil(saved)
    before = sorted(saved.parent.rglob("*"))
    assert run("generate", saved, "hi") == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert run("convert", saved, saved.parent / "out") == 2 or spoil in (big_vocabulary, hostile_template)
    if spoil not in (big_vocabulary, hostile_template):
        assert sorted(saved.parent.rglob("*")) == before


@pytest.mark.parametrize("command", ["generate", "inspect", "convert", "cost"])
def test_paths_that_are_no_model(
    tmp_path: Path, run, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    """Lightning-AI/litgpt#861: the whole path and what was looked for."""
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("x")
    extra = {"generate": ["hi"], "convert": [str(tmp_path / "out")]}.get(command, [])
    for path, message in (("nope", "no such path"), ("empty", "empty"), ("file.txt", "a file")):
        assert run(command, tmp_path / path, *extra) == 2
        err = capsys.readouterr().err
        assert str(tmp_path / path) in err
        assert message in err
        assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_gguf_that_is_none(tmp_path: Path, run, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "m.gguf").write_bytes(b"GGUF but not really" * 10)
    assert run("inspect", tmp_path / "m.gguf") == 2
    assert "GGUF" in capsys.readouterr().out
    assert run("generate", tmp_path / "m.gguf", "hi") == 2
    assert "m.gguf" in capsys.readouterr().err


def test_v2_lite_is_described_and_refused(
    tmp_path: Path, run, capsys: pytest.CaptureFixture[str], monkeypatch
) -> None:
    """31.4 GB of weights: cost and inspect speak of it; nothing is read of it."""
    from rorqual.model.published import PUBLISHED

    monkeypatch.setattr("rorqual.checkpoint.inspect.available_memory", lambda: 24_000_000_000)
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["deepseek-v2-lite"]))
    assert run("cost", tmp_path / "config.json") == 0
    assert "15.71B parameters, 2.45B active" in capsys.readouterr().out
    assert run("inspect", tmp_path) == 0
    out = capsys.readouterr().out
    assert "31.4 GB in bfloat16, 24.0 GB available" in out
    assert "refuse to load" in out


@pytest.mark.parametrize(
    "entry",
    ['{"dtype":"F32","shape":4,"data_offsets":[0,16]}', '{"dtype":["F32"],"shape":[4],"data_offsets":[0,16]}',
     '{"dtype":"F32","shape":[true,4],"data_offsets":[0,16]}', "[" * 100_000 + "]" * 100_000],
    ids=["shape", "dtype", "truth", "deep"],
)  # fmt: skip
def test_a_header_of_other_kinds_is_refused(tmp_path: Path, entry: str) -> None:
    header = f'{{"a":{entry}}}'.encode()
    (tmp_path / "x.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(16))
    with pytest.raises(CheckpointError, match=r"x\.safetensors: "):
        TensorFile(tmp_path / "x.safetensors")
