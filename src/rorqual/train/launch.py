"""`rorqual train --nproc N`: N processes of one machine that share a run. One that dies takes the others with it, and all
begin again at the last checkpoint. torchrun does the same over several machines, with the same environment.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

from rorqual.errors import RunError
from rorqual.parallel.environment import RESTARTS
from rorqual.train import folders
from rorqual.train.stop import exit_code

ATTEMPTS = 3  # starts without a new checkpoint before the run is given up
GRACE = 5.0  # seconds for the others to end by themselves, once one has failed
DONE = (0, 75, 130)  # exit codes of a process that came to its end: the first one may still write the report
ENDS = (2, *DONE)  # and of one that knew why it could not
LOGS = "workers"  # what all but the first process say, in the run's folder


def launch(processes: int, argv: Sequence[str], out: Path) -> int:
    """Run `rorqual train ARGV` in so many processes; returns the exit code of the run. After a signal nothing is started
    again. Raises RunError where processes die again and again before the next checkpoint."""
    team = _Team(processes, argv, out)
    before, attempts = folders.steps(out), 0
    with _Forward(team):
        while True:
            code = team.run()
            if code in ENDS:
                return code
            if team.asked is not None:
                print(f"{team.fate}; left, as {team.asked.name} asked", file=sys.stderr, flush=True)
                return exit_code(team.asked)
            there = folders.steps(out)
            attempts = 1 if there != before else attempts + 1
            before = there
            if attempts >= ATTEMPTS:
                raise RunError(
                    f"{out.resolve()}: {team.fate}, {attempts} times without a new checkpoint; given up. It said:\n"
                    + team.last_words()
                )
            where = f"from step {there[-1]:,}" if there else "from the beginning"
            print(f"{team.fate}; all processes go on {where}", file=sys.stderr, flush=True)


class _Team:
    """The processes of one start after another."""

    def __init__(self, size: int, argv: Sequence[str], out: Path) -> None:
        self.size, self.argv, self.out = size, argv, out
        self.processes: list[subprocess.Popen[bytes]] = []
        self.starts = 0
        self.fate = ""  # of the process that died
        self.dead = 0
        self.asked: signal.Signals | None = None

    def run(self) -> int:
        """Start all; the exit code that stands for the run: one of ENDS, or another where a process died."""
        port = _free_port()
        self.processes = [self._start(rank, port) for rank in range(self.size)]
        self.starts += 1
        if self.asked is not None:  # while they were started
            self.tell(self.asked)
        try:
            while not self._failed() and any(p.returncode is None for p in self.processes):
                time.sleep(0.02)
            died = next((p for p in self.processes if p.returncode not in (None, *ENDS)), None)
            if died is not None:
                # One that fell because another did is not the one to name; a fault that all see ends them all alike.
                self._wait(0.3)
                died = min(
                    (p for p in self.processes if p.returncode not in (None, *ENDS)),
                    key=lambda p: p.returncode,
                )
                self.dead = self.processes.index(died)
                self.fate = f"process {self.dead} {_fate(died.returncode)}"
            self._wait(GRACE)
            codes = [p.returncode for p in self.processes if p.returncode is not None]
            return 2 if 2 in codes else next((c for c in codes if c not in ENDS), codes[0])
        finally:
            for p in self.processes:
                if p.poll() is None:
                    p.kill()
                p.wait()

    def last_words(self) -> str:
        """Of the process that died."""
        path = self.out / LOGS / f"rank-{self.dead}.log"
        return path.read_text(errors="replace")[-2000:] if path.is_file() else "(see above)"

    def tell(self, number: signal.Signals) -> None:
        """Send a signal to all that run."""
        self.asked = number
        for p in self.processes:
            if p.poll() is None:
                p.send_signal(number)

    def _failed(self) -> bool:
        return any(p.poll() not in (None, *DONE) for p in self.processes)

    def _start(self, rank: int, port: int) -> subprocess.Popen[bytes]:
        threads = str(max(1, len(os.sched_getaffinity(0)) // self.size)) if sys.platform == "linux" else "1"
        env = {"OMP_NUM_THREADS": threads, **os.environ} | {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(self.size), "LOCAL_WORLD_SIZE": str(self.size),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), RESTARTS: str(self.starts),
        }  # fmt: skip
        if sys.platform == "linux":
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")
        output = None
        if rank:
            (self.out / LOGS).mkdir(parents=True, exist_ok=True)
            output = (self.out / LOGS / f"rank-{rank}.log").open("ab")
        try:
            return subprocess.Popen(
                [sys.executable, "-m", "rorqual.cli", "train", *self.argv],
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,  # Ctrl-C reaches them through us, once
                preexec_fn=end_with_parent(signal.SIGKILL),
            )
        finally:
            if output is not None:
                output.close()

    def _wait(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while any(p.poll() is None for p in self.processes) and time.monotonic() < end:
            time.sleep(0.01)


class _Forward:
    """SIGTERM and Ctrl-C go on to every process; they save and leave together."""

    def __init__(self, team: _Team) -> None:
        self.team = team

    def __enter__(self) -> None:
        self.before = {s: signal.signal(s, self._take) for s in (signal.SIGTERM, signal.SIGINT)}

    def __exit__(self, *_: object) -> None:
        for s, handler in self.before.items():
            signal.signal(s, handler)

    def _take(self, number: int, _: FrameType | None) -> None:
        self.team.tell(signal.Signals(number))


def end_with_parent(number: signal.Signals) -> Callable[[], None]:
    """For preexec_fn: the child gets the signal when the one who started it is gone (Linux)."""

    parent = os.getpid()

    def ask() -> None:
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:  # it was gone before
                os._exit(1)

    return ask


def _fate(code: int) -> str:
    return f"was killed by {signal.Signals(-code).name}" if code < 0 else f"left with code {code}"


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
