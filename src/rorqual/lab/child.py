"""The process of an attempt: `python -m rorqual.lab.child FOLDER ATTEMPT`. It knows its folder and nothing of the state
file, so it runs on any machine that sees the folder."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import TextIO

from rorqual.errors import RorqualError
from rorqual.lab import contract
from rorqual.lab.job import CURRENT, LOCK, LOG, RUN, Job, Outcome, seen, tail
from rorqual.train.launch import end_with_parent

LOCK_PATIENCE = 30.0  # seconds for an earlier attempt to be gone


class Wish:
    """SIGTERM before anyone else has taken it over."""

    def __init__(self) -> None:
        self.asked = False
        signal.signal(signal.SIGTERM, self._take)

    def _take(self, *_: object) -> None:
        self.asked = True


def main(folder: Path, attempt: int) -> int:
    """Run an attempt and leave its outcome. 75 as well where another attempt has taken its place."""
    begin = time.monotonic()
    wish = Wish()
    job = Job.read(folder, attempt)
    os.environ.update(environment(job))
    log = (folder / LOG).open("a", encoding="utf-8")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    lock = hold(folder / LOCK)
    if lock is None or (folder / CURRENT).read_text(encoding="utf-8").strip() != str(attempt):
        print(f"attempt {attempt}: another one runs or has been started; leaving", flush=True)
        return contract.LEFT
    print(f"--- attempt {attempt}: to step {job.budget}", flush=True)
    try:
        code = contract.LEFT if wish.asked else run(job, wish)
    except RorqualError as e:
        print(f"error: {e}", flush=True)
        code = 2
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    step, value = seen(folder, job.metric, job.budget)
    said = "" if code in (0, contract.LEFT) else tail(folder)
    Outcome(code, step, value, time.monotonic() - begin, said).write(folder, attempt)
    return code


def environment(job: Job) -> dict[str, str]:
    """What an attempt's processes find in their environment."""
    threads = {k: str(job.threads) for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return threads | {
        contract.ATTEMPT: job.token,
        contract.FOLDER: str(Path(job.folder) / RUN),
        contract.BUDGET: str(job.budget),
        contract.SETTINGS: json.dumps(job.settings),
    }


def hold(path: Path) -> TextIO | None:
    """The folder's lock; the system drops it when the last process that holds it ends. None: somebody keeps it."""
    file = path.open("a")
    os.set_inheritable(file.fileno(), True)  # a command's own process keeps it too
    end = time.monotonic() + LOCK_PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > end:
                return None
            time.sleep(0.05)
        else:
            return file


def run(job: Job, wish: Wish) -> int:
    """The attempt itself, by kind."""
    return {"train": _train, "function": _function, "command": _command}[job.kind](job, wish)


def _train(job: Job, wish: Wish) -> int:
    import torch

    from rorqual.config import from_dict
    from rorqual.train import folders
    from rorqual.train.config import TrainConfig
    from rorqual.train.run import train
    from rorqual.train.stop import exit_code
    from rorqual.train.view import Lines

    torch.set_num_threads(job.threads)
    config = dataclasses.replace(
        from_dict(TrainConfig, job.spec["config"]), out=Path(job.folder) / RUN, stop_at=job.budget
    )
    if wish.asked:
        return contract.LEFT
    return exit_code(train(config, resume=bool(folders.steps(config.out)), show=Lines()).stopped)


def _function(job: Job, wish: Wish) -> int:
    sys.path.insert(0, job.spec["folder"])
    os.chdir(job.spec["folder"])
    module, _, name = job.spec["function"].partition(":")
    function = getattr(importlib.import_module(module), name)
    trial = contract.Trial.current()
    trial.asked = wish.asked
    function(trial)
    return trial.exit_code


def _command(job: Job, wish: Wish) -> int:
    """Another program. It dies with us (on Linux), and hears what we hear."""
    process = subprocess.Popen(
        words(job),
        cwd=job.spec["folder"],
        stdin=subprocess.DEVNULL,
        preexec_fn=end_with_parent(signal.SIGKILL),
        close_fds=False,
    )
    signal.signal(signal.SIGTERM, lambda *_: process.terminate())
    if wish.asked:
        process.terminate()
    return process.wait()


def words(job: Job) -> list[str]:
    """A command with `{folder}`, `{budget}`, `{resume}` and its settings put in."""
    run = Path(job.folder) / RUN
    resume = any((run / "checkpoints").glob("step-*")) or (run / contract.SAVED).is_file()
    values = {"folder": str(run), "budget": str(job.budget), "resume": "--resume" if resume else ""}
    values |= {k: v if isinstance(v, str) else json.dumps(v) for k, v in job.settings.items()}
    found = []
    for word in shlex.split(job.spec["command"]):
        put = word
        for key, value in values.items():
            put = put.replace("{" + key + "}", value)
        if put or not word:  # an empty {resume} is no argument
            found.append(put)
    return found


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
