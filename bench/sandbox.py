"""How long a confined run takes, from a warm server and from a fresh interpreter: bench/records/rl_sandbox.json."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from record import Row, smaller, write_record

from rorqual.verify.sandbox import Sandbox

RUNS, FRESH = 500, 30
PAYLOAD = {"source": "def f(x):\n    return x + 1\n", "entry": "f", "calls": [[1], [2]]}


def main() -> None:
    """Measure and write the record."""
    with Sandbox() as sandbox:
        sandbox.start()
        warm = times(lambda: sandbox.run("rorqual.verify.player:call", PAYLOAD), RUNS)
        features = sandbox.features
    fresh = times(lambda: subprocess.run([sys.executable, "-S", "-c", PAYLOAD["source"]], check=True), FRESH)
    rows: list[Row] = [
        smaller(
            "sandbox, one confined run from the warm server, median",
            statistics.median(warm) * 1e3,
            10.0,
            "bound",
            goal=1.0,
            unit="ms",
        ),
        smaller(
            "sandbox, one confined run, beside a bare new interpreter without any confinement",
            statistics.median(warm) * 1e3,
            statistics.median(fresh) * 1e3,
            "python -S -c",
            unit="ms",
        ),
        smaller(
            "sandbox, one confined run, 99th percentile",
            sorted(warm)[int(RUNS * 0.99)] * 1e3,
            None,
            "",
            unit="ms",
        ),
    ]
    print(json.dumps([{"what": r.what, "ours": r.ours, "peer": r.peer} for r in rows], indent=1))
    write_record("rl_sandbox", rows, features=features)


def times(act: Callable[[], object], count: int) -> list[float]:
    """Seconds of each of `count` calls, after a few that are not counted."""
    found = []
    for i in range(count + 5):
        begin = time.perf_counter()
        act()
        if i >= 5:
            found.append(time.perf_counter() - begin)
    return found


if __name__ == "__main__":
    main()
