"""Attempts as processes of this machine, each in a session of its own, so that they outlive the scheduler."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from rorqual.errors import RunError
from rorqual.lab.child import environment
from rorqual.lab.job import LOG, Job
from rorqual.lab.processes import identity, is_here, is_running, memory_mb, pid_of, send, with_token


class Local:
    """Processes of this machine; those of an earlier scheduler are adopted by what they are known by."""

    def __init__(self) -> None:
        self._children: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, job: Job) -> str:
        try:
            with (Path(job.folder) / LOG).open("ab") as log:  # where a child that cannot even begin says why
                process = subprocess.Popen(
                    [sys.executable, "-m", "rorqual.lab.child", job.folder, str(job.attempt)],
                    env={**os.environ, **environment(job), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
                    stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=log, start_new_session=True,
                )  # fmt: skip
        except OSError as e:
            raise RunError(
                f"trial folder {job.folder}: no process could be started ({e.strerror or e})"
            ) from e
        handle = identity(process.pid)
        if handle is None:  # it has ended already: nothing to adopt, but its outcome may be there
            handle = f'{{"pid": {process.pid}, "start": "", "boot": "", "host": ""}}'
        self._children[handle] = process
        return handle

    def find(self, token: str) -> str | None:
        found = [identity(pid) for pid in with_token(token)]
        return next((known for known in found if known is not None), None)

    def alive(self, handle: str) -> bool:
        if handle in self._children:
            return self._children[handle].poll() is None
        return is_here(handle) and is_running(handle)

    def exit_code(self, handle: str) -> int | None:
        child = self._children.get(handle)
        return None if child is None else child.poll()

    def leave(self, handle: str) -> None:
        if self.alive(handle):
            send(pid_of(handle), signal.SIGTERM)

    def kill(self, handle: str, token: str) -> None:
        """The process, and all that carries the attempt's token."""
        if handle and self.alive(handle):
            send(pid_of(handle), signal.SIGKILL)
        for _ in range(10):  # one that is just being started shows no environment yet
            found = with_token(token)
            for pid in found:
                send(pid, signal.SIGKILL)
            if not found:
                break
            time.sleep(0.01)
        if handle in self._children:
            self._children[handle].wait()

    def held_mb(self, handle: str) -> float | None:
        return memory_mb(pid_of(handle))

    def close(self) -> None:
        self._children.clear()
