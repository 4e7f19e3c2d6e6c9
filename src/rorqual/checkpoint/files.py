"""Files that are whole or not there: written under a temporary name, synced, then renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rorqual.errors import CheckpointError


def require_place(target: Path) -> None:
    """Refuse, before the work for it begins, a folder that exists or cannot be made; its parents are made."""
    target = Path(os.path.abspath(target))
    if target.exists():
        raise CheckpointError(f"{target}: exists already; remove it or choose another folder")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise CheckpointError(f"{target}: cannot be made ({e.strerror or e}); choose another folder") from e
    if not os.access(target.parent, os.W_OK):
        raise CheckpointError(f"{target}: {target.parent} cannot be written to; choose another folder")


@contextmanager
def whole_folder(target: Path, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `target`; it takes the name once everything in it is on the disk.

    Raises CheckpointError where the target exists (unless `replace`). Whatever goes wrong, nothing
    half-written has the name.
    """
    target = Path(os.path.abspath(target))
    if not (replace and target.exists()):
        require_place(target)
    work = target.with_name(f".{target.name}.{os.getpid()}.partial")
    shutil.rmtree(work, ignore_errors=True)
    try:
        work.mkdir()
        yield work
        take_name(work, target)
    except OSError as e:
        shutil.rmtree(work, ignore_errors=True)
        raise CheckpointError(
            f"{target}: cannot be written ({e.strerror or e}); nothing was left behind"
        ) from e
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def take_name(work: Path, target: Path) -> None:
    """Sync a folder with all that is in it, and rename it; what had the name before goes."""
    for path in work.rglob("*"):
        _sync(path)
    _sync(work)
    if target.exists():
        old = target.with_name(f".{target.name}.{os.getpid()}.old")
        os.rename(target, old)
        os.rename(work, target)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.rename(work, target)
    _sync(target.parent)


def write_whole(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    work = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        work.write_text(text, encoding="utf-8")
        _sync(work)
        os.replace(work, path)
        _sync(path.parent)
    except OSError as e:
        work.unlink(missing_ok=True)
        raise CheckpointError(f"{path}: cannot be written ({e.strerror or e})") from e


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
