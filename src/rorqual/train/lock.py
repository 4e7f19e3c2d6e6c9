"""One process a run folder."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType

from rorqual.errors import RunError


class Lock:
    """Held while a run is trained; the system drops it when the process ends, however it ends."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a+")
        except OSError as e:
            raise RunError(
                f"out={folder.resolve()}: no folder to write a run to ({e.strerror}); choose another"
            ) from e

    def __enter__(self) -> Lock:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as e:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise RunError(
                f"{self.path.parent.resolve()}: in use by process {holder}; choose another folder or stop it"
            ) from e
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
