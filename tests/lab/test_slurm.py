"""Slurm against scripts of its own commands' names: a queue in a folder, processes for jobs."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rorqual.errors import RunError
from rorqual.lab.idea import Idea, submit
from rorqual.lab.scheduler import Scheduler
from rorqual.lab.settings import Settings
from rorqual.lab.slurm import Slurm
from rorqual.lab.store import Store

FAKE = """#!{python}
import os, signal, subprocess, sys
from pathlib import Path
queue, name, words = Path("{queue}"), Path(sys.argv[0]).name, sys.argv[1:]
def alive(pid):
    try: return open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError: return False
if name == "sbatch":
    o = dict(w[2:].split("=", 1) for w in words if "=" in w)
    out = open(o["output"], "a")
    p = subprocess.Popen(["sh", "-c", o["wrap"]], stdout=out, stderr=out, start_new_session=True)
    assert "--requeue" in words
    (queue / str(p.pid)).write_text(o["job-name"])
    print(p.pid)
elif name == "squeue":
    for f in queue.iterdir():
        print(f"{{f.name}}|{{'RUNNING' if alive(f.name) else 'COMPLETED'}}|{{f.read_text()}}")
else:
    number = signal.SIGTERM if "--signal=TERM" in words else signal.SIGKILL
    try: os.kill(int(words[-1]), number)
    except ProcessLookupError: pass
"""
IDEA = """
def idea(trial):
    step = (trial.saved or (0, None))[0]
    while not trial.should_stop():
        step += 1
        trial.done(step, loss=1 / step)
    trial.save(step)
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: Any) -> Path:
    """sbatch, squeue and scancel on the path."""
    tools, queue = tmp_path / "bin", tmp_path / "queue"
    tools.mkdir()
    queue.mkdir()
    for name in ("sbatch", "squeue", "scancel"):
        (tools / name).write_text(FAKE.format(python=sys.executable, queue=queue), encoding="utf-8")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("rorqual.lab.slurm.EVERY", 0.1)
    (tmp_path / "slurm_idea.py").write_text(IDEA, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_trial_climbs_through_slurm(cluster: Path) -> None:
    store = Store(cluster / "lab")
    submit(store, Idea(config="slurm_idea:idea", steps=4, eta=2, rungs=2))
    settings = Settings(backend="slurm", memory_mb=500, idle=0.0, min_free_mb=0)
    end = time.monotonic() + 60
    Scheduler(store, Slurm(), settings, say=lambda _: None).run(stop=lambda: time.monotonic() > end)
    assert store.trial(1).state == "done", store.trial(1).message
    assert [(s, v) for _, s, v in store.results(1)] == [(2, 0.5), (4, 0.25)]


def test_a_controller_that_does_not_answer_has_ended_nobody(cluster: Path) -> None:
    slurm = Slurm()
    slurm._states = {"7": ("RUNNING", "x")}
    (cluster / "bin" / "squeue").write_text("#!/bin/sh\necho down >&2\nexit 1\n", encoding="utf-8")
    slurm._look()
    assert slurm.alive("7")


def test_without_slurm_the_message_says_so(monkeypatch: Any, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RunError, match="needs Slurm's commands"):
        Slurm._call("sbatch")
