"""Training on many processes of this machine: the same losses as one process, seconds lost to a killed worker, speed.

python bench/parallel.py DATA      # a folder of `rorqual data build`
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from record import Row, faster, write_record

from rorqual.train.metrics import read

WAYS = {
    "data": [],
    "FSDP2": ["parallel.shard=true"],
    "experts": ["parallel.expert=2"],
    "experts and FSDP2": ["parallel.expert=2", "parallel.shard=true"],
    "heads": ["parallel.tensor=2"],
}
RUN = [
    "--depth", "2", "--steps", "20", "seq_len=128", "batch_size=8", "dtype=float32", "device=cpu", "eval_every=0",
    "sample_every=0", "save_every=0",
]  # fmt: skip


def command(data: Path, out: Path, *more: str) -> list[str]:
    run = [sys.executable, "-m", "rorqual.cli", "train", "--data", str(data), "--out", str(out)]
    return [*run, *RUN, *more]


def train(data: Path, out: Path, *more: str) -> list[dict[str, Any]]:
    """The lines of a run."""
    done = subprocess.run(command(data, out, *more), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return read(out)


def recovery(data: Path, out: Path) -> float:
    """Seconds from the kill of one of two workers to the first step after it."""
    more = ("--nproc", "2", "steps=100000", "save_every=10", "parallel.expert=2", "parallel.shard=true")
    process = subprocess.Popen(
        command(data, out, *more), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while len(read(out)) < 25:
            time.sleep(0.1)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(children[1]), signal.SIGKILL)
        begin, before = time.monotonic(), read(out)[-1]["step"]
        # The log is cut back to the checkpoint, and grows again.
        while read(out)[-1]["step"] >= before:
            time.sleep(0.01)
        cut = read(out)[-1]["step"]
        while read(out)[-1]["step"] <= cut:
            time.sleep(0.01)
        return time.monotonic() - begin
    finally:
        process.terminate()
        process.wait()


def main() -> int:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    data = parser.parse_args().data.resolve()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        one = train(data, Path(work) / "one")
        for name, way in WAYS.items():
            many = train(data, Path(work) / name.replace(" ", "-"), "--nproc", "2", *way)
            first = abs(many[0]["loss"] - one[0]["loss"])
            norm = abs(many[0]["grad_norm"] - one[0]["grad_norm"])
            last = abs(many[-1]["loss"] - one[-1]["loss"])
            worst = max(first, norm, 1e-9)
            rows.append(
                Row(f"two processes share {name}: first loss and gradient norm as one process", worst, 1e-5, "bound",
                    1e-5 / worst, 1.0, "", f"after 20 steps losses differ by {last:.1e}")
            )  # fmt: skip
        lost = recovery(data, Path(work) / "killed")
        rows.append(
            Row(
                "seconds from a worker's SIGKILL to the next step", lost, 10.0, "bound", 10.0 / lost, 1.0, "s"
            )
        )
        big = ("dtype=bfloat16", "--depth", "4", "seq_len=256", "batch_size=16", "--steps", "30")
        alone = train(data, Path(work) / "alone", *big)[-1]["tokens_per_second"]
        two = train(data, Path(work) / "two", *big, "--nproc", "2")[-1]["tokens_per_second"]
        rows.append(
            faster("two processes of one thread, beside one of two threads", two, alone, "one process",
                   None, "tokens/s", "8.3M parameters, data parallel through gloo")
        )  # fmt: skip
    for row in rows:
        print(row)
    print(write_record("parallel", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
