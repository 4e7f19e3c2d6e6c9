"""`rorqual rl` and `rorqual compare` as commands of the lab: they go to a budget, leave when asked, and go on."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rorqual.lab.child import words
from rorqual.lab.job import Job, lines, seen
from rorqual.train import checkpoint, folders

RL = f"{sys.executable} -m rorqual.cli rl --config {{config}} --out {{folder}} stop_at={{budget}} {{resume}} lr={{lr}}"
COMPARE = (
    f"{sys.executable} -m rorqual.cli compare --out {{folder}} --steps {{budget}} --width 16 --depth 2 --seeds 1 "
    "--no-controls --sources {sources} --workers 1"
)
CONFIG = {
    "shape": {"depth": 2, "width": 32, "heads": 2, "experts": 4, "experts_per_token": 2},
    "tasks": [{"options": {"terms": 2, "digits": 2}, "difficulty": 0}],
    "sampling": {"prompts": 4, "group": 4, "max_tokens": 6, "max_prompt": 10, "refill": 1},
    "cold_start": {"steps": 3, "batch": 8, "eval_every": 2, "warmup": 2},
    "steps": 6, "updates": 2, "eval_every": 0, "eval_problems": 8, "pass_k": 0, "save_every": 100,
}  # fmt: skip


def job(folder: Path, budget: int, command: str, metric: str, settings: dict[str, object]) -> Job:
    found = Job(
        "t", 1, str(folder), budget, (budget,), metric, "command", {"command": command, "folder": str(folder)},
        settings, "idea", 1, 4000,
    )  # fmt: skip
    found.write()
    return found


def run(found: Job) -> int:
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words(found), env=env, capture_output=True, text=True)
    assert done.returncode in (0, 75), done.stderr
    return done.returncode


def test_reinforcement_goes_from_rung_to_rung(tmp_path: Path) -> None:
    """Up to step 5, then 9, as one that goes to 9 at once: the same weights, and an accuracy at each rung."""
    config = tmp_path / "rl.json"
    config.write_text(json.dumps(CONFIG))
    settings = {"config": str(config), "lr": 0.001}
    for budget in (5, 9):
        assert run(job(tmp_path / "trial", budget, RL, "accuracy", settings)) == 0
        step, value = seen(tmp_path / "trial", "accuracy", budget)
        assert step == budget
        assert value is not None
    assert run(job(tmp_path / "whole", 9, RL, "accuracy", settings)) == 0
    for name in ("model.safetensors", checkpoint.TENSORS):
        one, two = (folders.folder_of(tmp_path / t / "run", 9) / name for t in ("trial", "whole"))
        assert one.read_bytes() == two.read_bytes(), name


def test_reinforcement_leaves_when_asked(tmp_path: Path) -> None:
    config = tmp_path / "rl.json"
    config.write_text(json.dumps({**CONFIG, "steps": 100000}))
    found = job(tmp_path / "trial", 100000, RL, "accuracy", {"config": str(config), "lr": 0.001})
    process = subprocess.Popen(words(found), env={**os.environ, "OMP_NUM_THREADS": "1"})
    log = tmp_path / "trial/run/metrics.jsonl"
    end = time.monotonic() + 60
    while len(list(lines(log))) < 4 and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    assert folders.steps(tmp_path / "trial/run")[-1] == list(lines(log))[-1]["step"]


@pytest.mark.slow
def test_a_comparison_has_a_rung_for_each_number_of_steps(tmp_path: Path) -> None:
    """Its runs are whole schedules, so a larger budget computes them anew; both rungs stay in the log."""
    sources = tmp_path / "text"
    sources.mkdir()
    for i in range(60):
        text = [f"def function_{i}_{j}(value):\n    return value * {i} + {j * i}\n" for j in range(1, 20)]
        (sources / f"m{i}.py").write_text("\n".join(text))
    for budget in (60, 90):
        trial = job(tmp_path / "trial", budget, COMPARE, "flops_factor", {"sources": str(sources)})
        assert run(trial) == 0
        step, value = seen(tmp_path / "trial", "flops_factor", budget)
        assert step == budget
        assert value is not None
    assert [x["step"] for x in lines(tmp_path / "trial/run/metrics.jsonl")] == [60, 90]
