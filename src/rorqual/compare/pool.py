"""Jobs on the cores: one process and one thread each, so that a run's seconds do not depend on its neighbours."""

from __future__ import annotations

import multiprocessing
import signal
import sys
import time
from collections.abc import Callable, Iterable
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from typing import Any

from rorqual.compare.job import Job, Result, run
from rorqual.errors import RorqualError, RunError
from rorqual.train.stop import Stop

Say = Callable[[str], None]
FAILED = 2  # exit code of a job whose message lies in its folder


class Stopped(Exception):
    """A signal ended the comparison; its runs are saved."""

    def __init__(self, by: signal.Signals) -> None:
        super().__init__("stopped; the same command goes on from here")
        self.signal = by


class Pool:
    """Runs jobs, `workers` at a time; those with a result are not run again. `seconds` is the time spent.

    While entered, a signal is a wish: jobs that run save and leave, and `all` raises Stopped, now or when next called.
    """

    def __init__(self, workers: int, say: Say) -> None:
        self.workers, self.say = workers, say
        self.seconds = 0.0
        self._stop = Stop()
        # A forked server that has imported torch and started no thread: a job begins at once.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["torch", "rorqual.train.run"])

    def __enter__(self) -> Pool:
        self._stop.__enter__()
        return self

    def __exit__(self, *why: Any) -> None:
        self._stop.__exit__(*why)

    def all(self, jobs: Iterable[Job]) -> list[Result]:
        """Results in the jobs' order. Raises Stopped after a signal, RunError where a run failed or was killed."""
        jobs = list(jobs)
        begin = time.monotonic()
        self._compute([job for job in jobs if job.result is None])
        self.seconds += time.monotonic() - begin
        return [_result(job) for job in jobs]

    def _compute(self, waiting: list[Job]) -> None:
        running: dict[Any, tuple[Job, ForkServerProcess]] = {}
        try:
            while waiting or running:
                if self._stop.signal is not None:
                    raise Stopped(self._stop.signal)
                while waiting and len(running) < self.workers:
                    job = waiting.pop(0)
                    process = self._context.Process(target=_work, args=(job,), daemon=True)
                    process.start()
                    running[process.sentinel] = job, process
                for sentinel in wait(list(running), timeout=0.2):
                    job, process = running.pop(sentinel)
                    process.join()
                    if process.exitcode == 0 and job.result is not None:
                        self.say(line(job, job.result, len(waiting) + len(running)))
                    elif self._stop.signal is not None:
                        raise Stopped(self._stop.signal)
                    else:
                        raise RunError(_why(job, process.exitcode))
        finally:
            for _, process in running.values():
                process.terminate()  # a wish: it saves and leaves
            for _, process in running.values():
                process.join()


def _result(job: Job) -> Result:
    found = job.result
    assert found is not None
    return found


def _why(job: Job, code: int | None) -> str:
    said = job.config.out / "error.txt"
    why = (
        said.read_text(encoding="utf-8")
        if code == FAILED and said.is_file()
        else f"its process ended with {code}"
    )
    return f"{job.config.out}: {why}; the same command goes on from what is there"


def _work(job: Job) -> None:
    try:
        run(job)
    except RorqualError as e:
        (job.config.out / "error.txt").write_text(str(e), encoding="utf-8")
        sys.exit(FAILED)


def line(job: Job, r: Result, waiting: int) -> str:
    """A finished run in a line."""
    name = " ".join((r.setting, *(f"{key.rpartition('.')[2]}={value}" for key, value in job.setting.more)))
    return (
        f"{name:<34} {r.steps:>6,} steps, seed {r.seed}: loss {r.loss:.4f}, {r.flops:.2e} FLOPs, "
        f"{r.wall_seconds:.0f} s, {r.peak_bytes / 1e6:.0f} MB" + (f"; {waiting} to go" if waiting else "")
    )
