"""Peak memory of `rorqual data build` on an input far larger than it: articles repeated with noise, under 1 GB."""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import psutil
from corpus import article
from record import Row, smaller, write_record

GOAL = 1e9


def make(path: Path, gigabytes: float) -> int:
    """JSON lines: fresh articles and, two of three times, an earlier one with a word exchanged."""
    rng, size = random.Random(0), 0
    earlier: list[str] = []
    with path.open("w", encoding="utf-8") as file:
        while size < gigabytes * 1e9:
            if not earlier or rng.random() < 0.33:
                text = article(rng, 120)
                if len(earlier) < 2000:
                    earlier.append(text)
            else:
                words = rng.choice(earlier).split(" ")
                words[rng.randrange(len(words))] = f"x{rng.randrange(10**9)}"
                text = " ".join(words)
            file.write(json.dumps({"text": text}) + "\n")
            size += len(text)
    return size


class Watch(threading.Thread):
    """The largest sum of private memory over a process and its children."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.process, self.peak = psutil.Process(pid), 0

    def run(self) -> None:
        while True:
            try:
                family = [self.process, *self.process.children(recursive=True)]
                self.peak = max(self.peak, sum(p.memory_full_info().uss for p in family if p.is_running()))
            except psutil.NoSuchProcess:
                if not self.process.is_running():
                    return
            time.sleep(0.25)


def main() -> int:
    """Build, watch, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=5.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        source = Path(work) / "pool.jsonl"
        size = make(source, options.gigabytes)
        command = [sys.executable, "-m", "rorqual.cli", "data", "build", str(source), "--out", f"{work}/out"]
        begin = time.monotonic()
        process = subprocess.Popen([*command, "--vocab-size", "8192"])
        watch = Watch(process.pid)
        watch.start()
        code = process.wait()
        seconds = time.monotonic() - begin
        if code:
            return code
        meta = json.loads((Path(work) / "out" / "meta.json").read_text(encoding="utf-8"))
    rows: list[Row] = [
        smaller(f"data build of {size / 1e9:.1f} GB, peak memory", watch.peak / 1e9, 1.0, "bound", 1.0, "GB"),
        Row(f"data build of {size / 1e9:.1f} GB, whole", size / 1e6 / seconds, unit="MB/s"),
    ]
    write_record("data_memory", rows, documents=meta["tally"]["documents"], kept=meta["tally"]["kept"])
    for row in rows:
        print(row)
    return 0


if __name__ == "__main__":
    sys.exit(main())
