"""Processes known for certain: by number, start and boot, so that a number used again is not mistaken for another's."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from pathlib import Path

from rorqual.lab.contract import ATTEMPT


def identity(pid: int) -> str | None:
    """What a process is known by; None where it does not run. The start is counted in ticks since boot: changing the
    clock does not change it."""
    start = _start(pid)
    if start is None:
        return None
    return json.dumps({"pid": pid, "start": start, "boot": _boot(), "host": socket.gethostname()})


def pid_of(known: str) -> int:
    return int(json.loads(known)["pid"])


def is_running(known: str) -> bool:
    """Whether the process of an identity still runs; a dead one that nobody has waited for does not."""
    return identity(pid_of(known)) == known


def is_here(known: str) -> bool:
    """Whether an identity is of this machine, whatever its boot."""
    return str(json.loads(known)["host"]) == socket.gethostname()


def with_token(token: str) -> list[int]:
    """Processes that carry an attempt's token in their environment: the attempt and whatever it has started."""
    import psutil

    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(ATTEMPT) == token and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return sorted(found)


def send(pid: int, number: signal.Signals) -> None:
    """A signal to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def memory_mb(pid: int) -> float:
    """What a process and its descendants hold; 0 where it is gone."""
    import psutil

    total = 0.0
    with contextlib.suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):
                total += one.memory_info().rss / 2**20
    return total


def _start(pid: int) -> str | None:
    stat = Path(f"/proc/{pid}/stat")
    if Path("/proc/self/stat").exists():
        try:
            fields = stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
        except OSError:
            return None
        return None if fields[0] in "ZX" else fields[19]
    import psutil  # systems without /proc

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else str(process.create_time())
    except psutil.Error:
        return None


def _boot() -> str:
    path = Path("/proc/sys/kernel/random/boot_id")
    return path.read_text(encoding="utf-8").strip() if path.exists() else ""
