"""Processes started together: they end together, stop together, and go on when one is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rorqual.errors import RunError
from rorqual.train import folders, launch
from rorqual.train.metrics import read

SETTINGS = [
    "--depth", "2", "shape.width=32", "shape.heads=2", "shape.experts=4", "shape.experts_per_token=2", "dtype=float32",
    "batch_size=4", "seq_len=32", "eval_rows=4", "sample_every=0", "device=cpu",
]  # fmt: skip


def command(token_set: Path, out: Path, *more: str) -> list[str]:
    run = ["train", "--data", str(token_set), "--out", str(out), *SETTINGS, *more]
    return [sys.executable, "-m", "rorqual.cli", *run]


def start(*arguments: str) -> subprocess.Popen[str]:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, start_new_session=True
    )


def wait_for_step(out: Path, step: int, seconds: float = 60.0) -> float:
    """Seconds until a step is in the log."""
    begin = time.monotonic()
    while time.monotonic() < begin + seconds:
        lines = read(out)
        if lines and lines[-1]["step"] >= step:
            return time.monotonic() - begin
        time.sleep(0.02)
    raise AssertionError(f"no step {step} in {seconds} s")


def children(pid: int) -> list[int]:
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(p) for p in found]


@pytest.mark.skipif(sys.platform != "linux", reason="finds the processes in /proc")
def test_a_killed_worker_costs_seconds(token_set: Path, tmp_path: Path) -> None:
    """SIGKILL to one of two processes: training goes on at the last checkpoint, and ends as a run without the kill."""
    way = (
        "--nproc",
        "2",
        "parallel.expert=2",
        "parallel.shard=true",
        "steps=60",
        "save_every=5",
        "eval_every=10",
    )
    whole = start(*command(token_set, tmp_path / "whole", *way))
    _, error = whole.communicate(timeout=120)
    assert whole.returncode == 0, error

    process = start(*command(token_set, tmp_path / "run", *way))
    wait_for_step(tmp_path / "run", 6)
    workers = children(process.pid)
    assert len(workers) == 2
    os.kill(workers[1], signal.SIGKILL)
    # The new processes' first step begins with the log cut back to the checkpoint.
    killed_at = read(tmp_path / "run")[-1]["step"]
    wait_for_step(tmp_path / "run", min(killed_at + 1, 60))
    said, error = process.communicate(timeout=120)
    assert process.returncode == 0, error
    assert "process 1 was killed by SIGKILL; all processes go on from step" in error
    assert "rorqual generate" in said
    one, two = read(tmp_path / "whole"), read(tmp_path / "run")
    assert [x["loss"] for x in one] == [x["loss"] for x in two]
    names = sorted(p.name for p in (folders.folder_of(tmp_path / "run", 60) / "pieces").iterdir())
    for name in names:
        a, b = (folders.folder_of(tmp_path / r, 60) / "pieces" / name for r in ("whole", "run"))
        assert a.read_bytes() == b.read_bytes(), name


def test_they_stop_together_and_go_on_with_another_number(token_set: Path, tmp_path: Path) -> None:
    """SIGTERM to the launcher: all save and leave with 75; one process goes on where two stopped."""
    out = tmp_path / "run"
    process = start(*command(token_set, out, "--nproc", "2", "steps=100000"))
    wait_for_step(out, 3)
    process.send_signal(signal.SIGTERM)
    said, error = process.communicate(timeout=60)
    assert process.returncode == 75, error
    assert "go on with --resume" in said
    step = folders.steps(out)[-1]
    assert read(out)[-1]["step"] == step
    again = start(
        sys.executable, "-m", "rorqual.cli", "train", "--resume", "--out", str(out), f"stop_at={step + 2}"
    )
    _, error = again.communicate(timeout=60)
    assert again.returncode == 0, error
    assert [x["step"] for x in read(out)] == list(range(1, step + 3))
    assert not (folders.folder_of(out, step + 2) / "pieces").exists()


def test_a_slip_is_said_once_and_not_tried_again(token_set: Path, tmp_path: Path) -> None:
    process = start(*command(token_set, tmp_path / "run", "--nproc", "3"))
    _, error = process.communicate(timeout=60)
    assert process.returncode == 2
    assert error.count("batch_size=4: must be a multiple of 3") == 1
    assert "go on" not in error


def test_processes_that_always_die_are_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three starts without a new checkpoint; the end of what the dead one said is in the message."""
    starts = []

    def start_one(team: launch._Team, rank: int, port: int) -> subprocess.Popen[bytes]:
        starts.append(rank)
        (tmp_path / "workers").mkdir(exist_ok=True)
        (tmp_path / "workers/rank-1.log").write_text("out of luck")
        return subprocess.Popen(
            [sys.executable, "-c", f"import sys, time; time.sleep({1 - rank}); sys.exit(3 * {rank})"]
        )

    monkeypatch.setattr(launch._Team, "_start", start_one)
    with pytest.raises(
        RunError, match=r"process 1 left with code 3, 3 times without a new checkpoint(.|\n)*out of luck"
    ):
        launch.launch(2, [], tmp_path)
    assert starts == [0, 1] * 3


def program(monkeypatch: pytest.MonkeyPatch, text: str) -> list[int]:
    """Processes run `text`, which knows its `rank`, in place of training; the ranks that were started."""
    starts: list[int] = []

    def start_one(team: launch._Team, rank: int, port: int) -> subprocess.Popen[bytes]:
        starts.append(rank)
        return subprocess.Popen([sys.executable, "-c", f"import sys, time; rank = {rank}; {text}"])

    monkeypatch.setattr(launch._Team, "_start", start_one)
    return starts


def test_the_first_may_write_its_report_as_long_as_it_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    starts = program(monkeypatch, "time.sleep(0.5 * (rank == 0))")
    monkeypatch.setattr(launch, "GRACE", 0.01)
    assert launch.launch(2, [], tmp_path) == 0
    assert starts == [0, 1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_nothing_is_started_again_after_a_signal(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
) -> None:
    """Processes that cannot listen yet die of it."""
    starts = program(monkeypatch, "time.sleep(60)")
    honest = launch._free_port

    def asked() -> int:
        signal.raise_signal(number)  # the earliest moment: none is there to hear it
        return honest()

    monkeypatch.setattr(launch, "_free_port", asked)
    assert launch.launch(2, [], tmp_path) == {signal.SIGTERM: 75, signal.SIGINT: 130}[number]
    assert starts == [0, 1]
    assert f"left, as {number.name} asked" in capsys.readouterr().err


def test_it_runs_under_torchrun(token_set: Path, tmp_path: Path) -> None:
    """The same command line, started by torch's own launcher."""
    out = tmp_path / "run"
    arguments = command(token_set, out, "steps=4", "save_every=2")[1:]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", *arguments],
        capture_output=True, text=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert folders.steps(out) == [2, 4]
    tree = json.loads((folders.folder_of(out, 4) / "trainer.json").read_text())
    assert len([n for n in tree["sha256"] if n.startswith("pieces/")]) == 2
