"""Real processes: promoted and killed, and equal to one that was not; commands and functions; what a slot may hold."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from rorqual.lab.idea import Idea, submit
from rorqual.lab.job import Job
from rorqual.lab.local import Local
from rorqual.lab.processes import identity, is_running, pid_of, with_token
from rorqual.lab.rungs import Ladder
from rorqual.lab.scheduler import Scheduler, hold, scheduler_pid
from rorqual.lab.settings import Settings
from rorqual.lab.store import PRIORITIES, Store

IDEA = """
import os, time

def idea(trial):
    step, total = trial.saved or (0, 0.0)
    go = os.path.join(os.path.dirname(__file__), "go")
    while not trial.should_stop():
        time.sleep(trial.settings.get("wait", 0.0))
        if step >= trial.settings.get("hold", step + 1) and not os.path.exists(go):
            continue  # the last step waits until it may be taken
        step, total = step + 1, total + 1 / (step + trial.settings["x"])
        trial.done(step, loss=total)
        trial.save(step, total)

def early(trial):
    trial.done(1, loss=1.0)

def crash(trial):
    raise ValueError("no luck with " + str(trial.settings["x"]))
"""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: Any) -> Store:
    """A lab beside a module of ideas."""
    (tmp_path / "ideas.py").write_text(IDEA, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return Store(tmp_path / "lab")


def finish(store: Store, seconds: float = 60.0, **settings: Any) -> None:
    """Schedule here until there is no work."""
    s = Settings(**{"slots": 2, "memory_mb": 4000, "idle": 0.0, "min_free_mb": 0, **settings})
    end = time.monotonic() + seconds
    Scheduler(store, Local(), s, say=lambda _: None).run(stop=lambda: time.monotonic() > end)
    assert time.monotonic() < end, [(t.id, t.state, t.message) for t in store.trials()]


def test_a_function_climbs_and_its_log_has_every_step_once(lab: Store) -> None:
    submit(lab, Idea(config="ideas:idea", settings={"x": 1.0}, steps=9))
    finish(lab)
    trial = lab.trial(1)
    assert trial.state == "done", trial.message
    log = (lab.folder_of(trial) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in log] == list(range(1, 10))
    assert trial.value == sum(1 / (i + 1.0) for i in range(9))


def test_a_command_keeps_the_contract(lab: Store) -> None:
    code = (
        "import sys\nfrom rorqual.lab.contract import Trial\ntrial = Trial.current()\n"
        "step = (trial.saved or (0, None))[0]\n"
        "while not trial.should_stop():\n    step += 1\n"
        "    trial.done(step, loss=float(sys.argv[1]))\n    trial.save(step)\n"
        "sys.exit(trial.exit_code)\n"
    )
    Path("own.py").write_text(code, encoding="utf-8")
    submit(lab, Idea(command=f"{sys.executable} own.py {{x}}", settings={"x": 0.25}, steps=4, rungs=1))
    finish(lab)
    assert (lab.trial(1).state, lab.trial(1).value) == ("done", 0.25)


def test_one_that_crashes_is_given_up_with_its_last_words(lab: Store) -> None:
    submit(lab, Idea(config="ideas:crash", settings={"x": 7}, steps=1, rungs=1))
    finish(lab, attempts=1)
    assert lab.trial(1).state == "failed"
    assert "ValueError: no luck with 7" in lab.trial(1).message


def test_one_that_ends_early_is_given_up_and_told_why(lab: Store) -> None:
    submit(lab, Idea(config="ideas:early", settings={}, steps=9, rungs=1))
    finish(lab, 20.0, attempts=2)
    assert lab.trial(1).state == "failed"
    assert "ended at step 1 of 9 without being asked to" in lab.trial(1).message
    assert len(lab.attempts_of(1)) == 2


def test_an_attempt_leaves_no_descriptor_open(tmp_path: Path) -> None:
    job = Job(
        "t",
        1,
        str(tmp_path / "trial"),
        1,
        (1,),
        "loss",
        "command",
        {"command": "true", "folder": "/"},
        {},
        "t",
        1,
        1,
    )
    job.write()
    before = len(os.listdir("/proc/self/fd"))
    local = Local()
    local.kill(local.start(job), "t")
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_that_outgrows_its_slot_is_ended_and_told_why(lab: Store) -> None:
    submit(lab, Idea(config="ideas:idea", settings={"x": 1.0, "wait": 5.0}, steps=1, rungs=1))
    finish(lab, memory_mb=1)
    assert lab.trial(1).state == "failed"
    assert "a slot has 1" in lab.trial(1).message


SCHEDULER = """
import sys
from pathlib import Path
from rorqual.lab.local import Local
from rorqual.lab.scheduler import Scheduler
from rorqual.lab.settings import Settings
from rorqual.lab.store import Store
# So many attempts that no kill counts as the last one: the trials wait before their last step till all have struck.
settings = Settings(slots=2, memory_mb=4000, idle=0.0, min_free_mb=0, attempts=100)
Scheduler(Store(Path(sys.argv[1])), Local(), settings, say=lambda _: None).run()
"""


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.slow)], ids=["three", "fifty"])
def test_killed_at_random_moments_nothing_is_lost_and_nothing_recorded_twice(lab: Store, kills: int) -> None:
    """SIGKILL to the scheduler or to a trial, whichever chance takes; every value equals the one computed without."""
    count, steps, randomly = 3, 9, random.Random(kills)
    for i in range(count):
        submit(
            lab,
            Idea(config="ideas:idea", settings={"x": 1.0 + i, "wait": 0.02, "hold": steps - 1}, steps=steps),
        )

    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", SCHEDULER, str(lab.folder)],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )

    scheduler, struck, end = start(), 0, time.monotonic() + 60 + 10 * kills
    while time.monotonic() < end:
        if struck < kills:
            time.sleep(randomly.uniform(0.05, 0.7))
            handles = [a.handle for a in lab.running() if a.handle]
            if handles and randomly.random() < 0.5:
                victim = pid_of(randomly.choice(handles))
                if identity(victim) in handles:
                    os.kill(victim, signal.SIGKILL)
                    struck += 1
            elif scheduler.poll() is None:
                scheduler.kill()
                struck += 1
        else:
            (lab.folder.parent / "go").touch()  # only now may a trial reach the end
        if scheduler.poll() is not None:
            code = scheduler.returncode
            if code == 0 and not lab.running():
                break
            assert code in (0, -signal.SIGKILL)
            scheduler = start()
        time.sleep(0.02)
    scheduler.wait(60)
    assert struck == kills
    states = {t.id: (t.state, t.message) for t in lab.trials()}
    # A guest that was killed while the others ended waits for more work beside it: the lab is done without it.
    guests = {t.id for t in lab.trials() if t.bonus}
    resting = {i: ("done", "paused", "waiting") if i in guests else ("done", "paused") for i in states}
    assert all(state in resting[i] for i, (state, _) in states.items()), states
    assert any(state == "done" for state, _ in states.values())
    for trial in lab.trials():
        log = (lab.folder_of(trial) / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        assert [json.loads(line)["step"] for line in log] == list(range(1, len(log) + 1)), "every step once"
        for _, step, value in lab.results(trial.id):
            assert value == sum(1 / (i + trial.settings["x"]) for i in range(step))
    assert len(lab.results(1)) >= 1
    rows = lab.db.execute("SELECT trial, rung, COUNT(*) FROM results GROUP BY trial, rung").fetchall()
    assert all(r[2] == 1 for r in rows)
    assert sum(r[1] == 0 for r in rows) == count


def test_a_killed_command_leaves_no_process_behind(lab: Store) -> None:
    study = lab.study("s", Ladder((1,)), "loss")
    spec = {"command": "sleep 1000", "folder": str(lab.folder)}
    lab.add(study, "ada", "sleeper", "command", spec, {}, PRIORITIES["normal"])
    scheduler = Scheduler(lab, Local(), Settings(slots=1, memory_mb=4000, min_free_mb=0), say=lambda _: None)
    scheduler.tick()
    (attempt,) = lab.running()
    token = f"{lab.folder}:{attempt.id}"
    end = time.monotonic() + 30
    while len(with_token(token)) < 2 and time.monotonic() < end:
        time.sleep(0.02)
    scheduler.backend.kill(attempt.handle or "", token)
    while with_token(token) and time.monotonic() < end:
        time.sleep(0.02)
    assert with_token(token) == []


def test_a_process_is_known_by_more_than_its_number() -> None:
    known = identity(os.getpid())
    assert known is not None
    assert is_running(known)
    other = json.dumps({**json.loads(known), "start": "1"})
    assert not is_running(other)


def test_one_scheduler_of_a_machine_holds_the_lock(lab: Store) -> None:
    assert scheduler_pid(lab.folder) is None
    lock = hold(lab.folder)
    assert lock is not None
    assert hold(lab.folder) is None
    assert scheduler_pid(lab.folder) == os.getpid()
    lock.close()
    assert scheduler_pid(lab.folder) is None
