"""Attempts as jobs of a Slurm cluster whose nodes see the lab's folder. Slurm may pre-empt and requeue them as it likes:
a job that begins again goes on from what the trial has saved."""

from __future__ import annotations

import hashlib
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rorqual.errors import RunError
from rorqual.lab.child import environment
from rorqual.lab.job import LOG, Job

EVERY = 1.0  # seconds between questions to the controller, for all jobs together
# What squeue says of a job that still runs, waits or will be begun again.
LIVE = frozenset({
    "PENDING", "RUNNING", "SUSPENDED", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED",
    "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED", "SPECIAL_EXIT",
})  # fmt: skip


class Slurm:
    """sbatch, squeue and scancel. A handle is a job's number."""

    def __init__(self, more: Sequence[str] = ()) -> None:
        self.more = tuple(more)
        self._states: dict[str, tuple[str, str]] = {}  # number: (state, name)
        self._asked = -EVERY
        self._new: set[str] = set()  # submitted after the last question

    def start(self, job: Job) -> str:
        child = [sys.executable, "-m", "rorqual.lab.child", job.folder, str(job.attempt)]
        said = self._call(
            "sbatch", "--parsable", "--requeue", f"--job-name={name(job.token)}", f"--cpus-per-task={job.threads}",
            f"--mem={job.memory_mb}", f"--output={Path(job.folder) / LOG}", "--open-mode=append", "--export=ALL",
            "--ntasks=1", *self.more, f"--wrap=exec {shlex.join(child)}",
            env={**os.environ, **environment(job), "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )  # fmt: skip
        number = said.split(";")[0].strip()
        if not number.isdigit():
            raise RunError(f"sbatch: answered {said.strip()!r} instead of a job's number")
        self._new.add(number)
        return number

    def find(self, token: str) -> str | None:
        self._look()
        return next((number for number, (_, known) in self._states.items() if known == name(token)), None)

    def alive(self, handle: str) -> bool:
        if time.monotonic() - self._asked >= EVERY:
            self._look()
        if handle in self._new:
            return True
        return self._states.get(handle, ("", ""))[0] in LIVE

    def exit_code(self, handle: str) -> int | None:
        return None  # the outcome in the trial's folder says it, or nobody knows

    def leave(self, handle: str) -> None:
        if self._states.get(handle, ("", ""))[0] == "PENDING":
            self._call("scancel", handle, check=False)  # it has nothing to save
        else:
            self._call("scancel", "--signal=TERM", "--full", handle, check=False)

    def kill(self, handle: str, token: str) -> None:
        for number in {handle, self.find(token)} - {"", None}:
            self._call("scancel", str(number), check=False)

    def held_mb(self, handle: str) -> float | None:
        return None

    def close(self) -> None:
        self._states.clear()

    def _look(self) -> None:
        """Ask for all jobs at once. A controller that does not answer has ended nobody's job."""
        self._asked = time.monotonic()
        try:
            said = self._call("squeue", "--me", "--noheader", "--states=all", "--format=%i|%T|%j")
        except RunError:
            return
        self._new.clear()
        rows = (line.strip().split("|", 2) for line in said.splitlines() if line.count("|") >= 2)
        self._states = {number: (state, known) for number, state, known in rows}

    @staticmethod
    def _call(*words: str, env: dict[str, str] | None = None, check: bool = True) -> str:
        try:
            done = subprocess.run(words, capture_output=True, text=True, env=env, timeout=60)
        except FileNotFoundError as e:
            raise RunError(
                f"{words[0]}: not found; backend=slurm needs Slurm's commands on this machine"
            ) from e
        except subprocess.TimeoutExpired as e:
            raise RunError(f"{words[0]}: no answer within a minute") from e
        if check and done.returncode:
            raise RunError(f"{words[0]}: {done.stderr.strip() or f'code {done.returncode}'}")
        return done.stdout


def name(token: str) -> str:
    """What an attempt's job is called: found again without its number."""
    return "rorqual-" + hashlib.sha256(token.encode()).hexdigest()[:16]
