"""One warm sandbox for a whole module, and a folder that every user can reach."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from rorqual.verify.sandbox import Sandbox


@pytest.fixture(scope="module")
def sandbox() -> Iterator[Sandbox]:
    with Sandbox() as sandbox:
        yield sandbox


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder in which an ordinary user may read and write, with a secret in it."""
    folder = Path(tempfile.mkdtemp(prefix="rorqual-attacks-"))
    folder.chmod(0o777)
    (folder / "secret").write_text("secret")
    (folder / "secret").chmod(0o666)
    yield folder
    shutil.rmtree(folder)
