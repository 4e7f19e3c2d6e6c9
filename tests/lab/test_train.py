"""A promoted run of `rorqual train` equals one that was never interrupted, to the bit."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from rorqual.config import from_dict, to_dict
from rorqual.lab import child
from rorqual.lab.job import Job, seen
from rorqual.train import checkpoint, folders
from rorqual.train.config import TrainConfig
from rorqual.train.run import train


class Silent:
    def update(self, line: Any) -> None: ...
    def say(self, text: str) -> None: ...
    def close(self) -> None: ...


def test_three_rungs_equal_one_run_bit_for_bit(token_set: Path, tmp_path: Path) -> None:
    tree = {
        "data": [str(token_set)], "steps": 9, "batch_size": 1, "seq_len": 16, "device": "cpu",
        "dtype": "float32", "eval_every": 1, "eval_rows": 2, "sample_every": 0,
        "shape": {"depth": 1, "width": 32, "heads": 2, "experts": 0},
    }  # fmt: skip
    config = from_dict(TrainConfig, tree)
    wish = type("Wish", (), {"asked": False})()
    folder = tmp_path / "trial"
    for number, budget in enumerate((1, 3, 9)):
        job = Job(
            "t", number, str(folder), budget, (1, 3, 9), "heldout_bpb", "train", {"config": to_dict(config)}, {},
            "idea", 1, 4000,
        )  # fmt: skip
        job.write()
        assert child.run(Job.read(folder, number), wish) == 0
        step, value = seen(folder, "heldout_bpb", budget)
        assert step == budget
        assert value is not None
    whole = dataclasses.replace(config, out=tmp_path / "whole")
    train(whole, show=Silent())
    for name in ("model.safetensors", checkpoint.TENSORS):
        one, two = (folders.folder_of(out, 9) / name for out in (whole.out, folder / "run"))
        assert one.read_bytes() == two.read_bytes(), name
