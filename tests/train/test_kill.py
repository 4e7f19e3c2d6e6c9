"""Runs killed without warning, and asked to leave through the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rorqual.config import to_dict
from rorqual.train import checkpoint, folders
from rorqual.train.command import TrainOptions, train_config
from rorqual.train.config import TrainConfig
from rorqual.train.metrics import read
from rorqual.train.run import train

Make = Callable[..., TrainConfig]

# Forks a run, kills it after a while and starts it again, until so many kills have struck and it comes to its end.
KILLER = """
import os, random, signal, sys, time
import torch
from pathlib import Path
from rorqual.config import load_config
from rorqual.device import Limits
from rorqual.train import checkpoint, folders, run
from rorqual.train.command import TrainOptions, train_config
from rorqual.train.config import TrainConfig

torch.set_num_threads(1)
run.measure_limits = lambda _: Limits(1e10, 1e11, 2e11)
config = load_config(TrainConfig, sys.argv[1])
kills, randomly = int(sys.argv[2]), random.Random(int(sys.argv[3]))
struck = 0
while True:
    child = os.fork()
    if child == 0:
        code = 1
        try:
            run.train(config, resume=bool(folders.steps(config.out)))
            code = 0
        finally:
            os._exit(code)
    if struck < kills:
        time.sleep(randomly.uniform(0.05, 0.6))
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        struck += 1
    elif os.WEXITSTATUS(status):
        sys.exit(1)
    else:
        break
print(struck)
"""


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)], ids=["three", "twenty"])
def test_a_run_killed_at_random_moments_ends_as_one_that_was_not(
    make_config: Make, tmp_path: Path, silent: Any, kills: int
) -> None:
    """A checkpoint is written after every step, so that many kills fall into the writing of one."""
    steps = 10 * kills
    whole = make_config(out=tmp_path / "whole", steps=steps)
    train(whole, show=silent)
    config = make_config(out=tmp_path / "killed", steps=steps, save_every=1)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(config)), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLER, str(path), str(kills), "1"],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) >= 1
    for name in ("model.safetensors", checkpoint.TENSORS):
        one, two = (folders.folder_of(c.out, steps) / name for c in (whole, config))
        assert one.read_bytes() == two.read_bytes(), name
    assert [x["loss"] for x in read(whole.out)] == [x["loss"] for x in read(config.out)]
    assert not list((config.out / "checkpoints").glob(".*"))


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "rorqual.cli", *arguments]


def test_a_scheduler_is_told_by_exit_code_75(token_set: Path, tmp_path: Path, silent: Any) -> None:
    """SIGTERM through the command line: saved, left, and resumed with no more than the folder's name."""
    out = tmp_path / "run"
    settings = [
        "--data", str(token_set), "--out", str(out), "--depth", "1", "steps=100000", "batch_size=1", "seq_len=16",
        "eval_every=0", "sample_every=0", "device=cpu",
    ]  # fmt: skip
    process = subprocess.Popen(command("train", *settings), stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    end = time.monotonic() + 60
    while not read(out) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "go on with --resume" in said
    step = folders.steps(out)[-1]
    assert step == read(out)[-1]["step"]
    options = TrainOptions(("eval_every=5", f"stop_at={step + 2}"), out=out, resume=True)
    assert train(train_config(options), resume=True, show=silent).step == step + 2


def test_a_resume_of_nothing_leaves_with_2(tmp_path: Path) -> None:
    """huggingface/trl#3179: a resume that starts anew without a word."""
    done = subprocess.run(
        command("train", "--resume", "--out", str(tmp_path / "no")), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"nothing to resume in {tmp_path / 'no'}" in done.stderr
