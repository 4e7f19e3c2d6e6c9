"""`rorqual rl --recipe sums` on three seeds: a model from nothing, its first steps, reinforcement, all on the clock.

    python bench/rl_sums.py [--runs FOLDER]

With --runs, runs that are finished there are read instead of made again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import Row, write_record

SECONDS = 600.0  # in all


def finished(run: Path) -> list[dict[str, Any]] | None:
    """The lines of a run that came to its end."""
    from rorqual.train.metrics import read

    lines = read(run)
    return lines if lines and lines[-1]["phase"] == "end" else None


def rows_of(seed: int, lines: list[dict[str, Any]]) -> list[Row]:
    """Accuracy at the end and what it took."""
    base = next(x for x in reversed(lines) if x["phase"] == "cold start" and "accuracy" in x)
    end = lines[-1]
    gone_back = sum(bool(x.get("collapsed")) for x in lines)
    note = (
        f"before {base['accuracy']:.1%} (pass@16 {base['pass_k']:.0%}) after {base['seconds']:.0f} s; interval "
        f"{end['accuracy_low']:.1%} to {end['accuracy_high']:.1%}; {end['seconds']:.0f} s in all; gone back {gone_back}x"
    )
    what = f"sums, seed {seed}: held-out accuracy"
    passed = end["accuracy"] > 0.8 and base["accuracy"] < 0.2 and end["seconds"] < SECONDS
    goal = 1.0
    return [
        Row(
            what, end["accuracy"], 0.8, "goal", end["accuracy"] / 0.8 if passed else 0.0, goal, "share", note
        ),
        Row(
            f"sums, seed {seed}: seconds in all",
            end["seconds"],
            SECONDS,
            "goal",
            SECONDS / end["seconds"],
            goal,
            "s",
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for seed in options.seeds:
            run = (options.runs or Path(work)) / f"sums-{seed}"
            if finished(run) is None:
                command = [sys.executable, "-m", "rorqual.cli", "rl", "--recipe", "sums", "--out", str(run)]
                subprocess.run([*command, f"seed={seed}"], check=True)
            lines = finished(run)
            assert lines is not None
            rows += rows_of(seed, lines)
            print(rows[-2].what, rows[-2].ours, rows[-2].note, flush=True)
    print(write_record("rl_sums", rows))


if __name__ == "__main__":
    main()
