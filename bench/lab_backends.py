"""One lab study through local processes, through Ray and through Slurm: are the ideas' results the same to the bit?

    python bench/lab_backends.py DATA --ray PYTHON_WITH_RAY_AND_TORCH --slurm

Slurm wants its daemons running here; one of its jobs is requeued by the administrator while it trains.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from record import Row, write_record

from rorqual.lab.store import Store

CONFIG = {
    "steps": 90, "batch_size": 4, "seq_len": 64, "dtype": "float32", "device": "cpu", "eval_every": 10, "eval_rows": 8,
    "sample_every": 0, "shape": {"depth": 1, "width": 32, "heads": 2, "experts": 4, "experts_per_token": 1},
}  # fmt: skip
RATES = (0.5, 0.25, 0.0005, 0.001, 0.1, 0.03, 0.004, 0.008, 0.016)


def study(backend: str, python: str, data: Path, folder: Path, requeue: bool = False) -> dict[str, Any]:
    """Nine rates, three rungs; what every one of them reached, and the seconds it took."""
    folder.mkdir(parents=True)
    config = folder / "base.json"
    config.write_text(json.dumps(CONFIG))
    lab = ["--lab", str(folder / "lab")]

    def rorqual(*words: str) -> None:
        done = subprocess.run(
            [python, "-m", "rorqual.cli", "lab", *words, *lab], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(f"{backend}: {' '.join(words)}: {done.stdout[-1500:]}{done.stderr[-3000:]}")

    rorqual("set", f"backend={backend}", "slots=2", "threads=1", "memory_mb=3000", "idle=0", "bonus=false")
    for rate in RATES:
        more = ("--data", str(data), "--hold", "--name", f"rate {rate}")
        rorqual("try", str(config), "--set", f"optim.lr={rate}", *more)
    begin = time.monotonic()
    struck: list[str] = []
    watcher = threading.Thread(target=_requeue, args=(struck,), daemon=True)
    if requeue:
        watcher.start()
    rorqual("run")
    store = Store(folder / "lab")
    return {
        "seconds": time.monotonic() - begin,
        "results": {(t.name, step): value for t in store.trials() for _, step, value in store.results(t.id)},
        "states": {t.name: t.state for t in store.trials()},
        "requeued": struck,
    }


def _requeue(struck: list[str]) -> None:
    """What an administrator, or a partition of higher priority, does to a running job."""
    end = time.monotonic() + 120
    while time.monotonic() < end:
        said = subprocess.run(
            ["squeue", "-h", "-t", "R", "-o", "%i|%M"], capture_output=True, text=True
        ).stdout
        for number, _, ran in (line.partition("|") for line in said.splitlines()):
            if ran.strip() not in ("0:00", "0:01", "0:02"):
                subprocess.run(["scontrol", "requeue", number], check=True)
                struck.append(number)
                return
        time.sleep(0.2)


def main() -> int:
    """Run, compare, record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path)
    parser.add_argument("--ray", help="a Python that has Ray and torch")
    parser.add_argument("--slurm", action="store_true")
    options = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
    with tempfile.TemporaryDirectory() as work:
        data = options.data.resolve()
        local = study("local", sys.executable, data, Path(work) / "local")
        others = {}
        if options.ray:
            os.environ["PYTHONPATH"] = str(Path(__file__).parent.parent / "src")
            others["Ray"] = study("ray", options.ray, data, Path(work) / "ray")
        if options.slurm:
            os.environ["PYTHONPATH"] = os.pathsep.join(p for p in sys.path if p)
            others["Slurm"] = study("slurm", sys.executable, data, Path(work) / "slurm", requeue=True)
    best = min((v, k) for k, v in local["results"].items() if k[1] == CONFIG["steps"])
    rows = [Row("the study through local processes", local["seconds"], unit="s", note=f"best: {best[1][0]}")]
    for name, found in others.items():
        common = [k for k in found["results"] if k in local["results"]]
        same = sum(found["results"][k] == local["results"][k] for k in common)
        note = f"{found['seconds']:.0f} s" + ("; one job requeued on the way" if found["requeued"] else "")
        if name == "Slurm" and not found["requeued"]:
            note += "; no job was requeued"
        rows.append(
            Row(f"the same study through {name}: results equal to the bit", same, len(common), "local processes",
                same / max(len(common), 1), 1.0, "results", note)
        )  # fmt: skip
        won = min((v, k) for k, v in found["results"].items() if k[1] == CONFIG["steps"])[1] == best[1]
        rows.append(Row(f"the same study through {name}: the same idea wins", float(won), 1.0, "local processes",
                        float(won), 1.0))  # fmt: skip
    for row in rows:
        print(row)
    print(write_record("lab_backends", rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
