"""How much less the recipe needs than a tuned Llama-style baseline: `rorqual compare`, and its record and page.

python bench/compare.py --budget quick       # or standard; runs that are there are not computed again
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import RECORDS, Row, write_record

# What we set out for, at the standard budget: (FLOPs, processor seconds).
GOALS = {
    "architecture and training": (6.0, 4.0),
    "against the baseline with the tables": (4.0, None),
    "data alone": (1.4, None),
    "architecture, training and data": (8.0, None),
}


def rows_of(tree: dict[str, Any], budget: str) -> list[Row]:
    """A row each for FLOPs, processor seconds and memory of every comparison; one that was not passed has no factor."""
    rows = []
    for name, m in tree["matches"].items():
        flops_goal, seconds_goal = GOALS.get(name, (None, None)) if budget == "standard" else (None, None)
        if m["passing_steps"] is None:
            best = min(max(r["losses"]) for r in m["runs"])
            note = f"not passed: loss {best:.4f} of {m['target_loss']:.4f}"
            rows.append(
                Row(f"{budget}, {name}: FLOPs", 0.0, None, m["baseline"], None, flops_goal, "x", note)
            )
            continue
        note = f"{m['passing_steps']:,} of {m['baseline_steps']:,} steps, loss {m['target_loss']:.4f}"
        for key, goal in (
            ("FLOPs", flops_goal),
            ("seconds", seconds_goal),
            ("memory", None),
        ):
            factor = m["factors"][key]
            what = "processor seconds" if key == "seconds" else key
            rows.append(
                Row(f"{budget}, {name}: {what}", factor, 1.0, m["baseline"], factor, goal, "x less", note)
            )
    for f in tree["factors"]:
        low, high = min(f["factors"]), max(f["factors"])
        worth = sum(f["factors"]) / len(f["factors"])
        rows.append(
            Row(
                f"{budget}, {f['kind']} {f['part']}: FLOPs",
                worth,
                1.0,
                "",
                worth,
                None,
                "x",
                f"{low:.2f} to {high:.2f}",
            )
        )
    return rows


def main() -> int:
    """Run the command, then write its findings as a record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--budget", default="quick")
    parser.add_argument("--out", type=Path, default=Path("runs/compare"))
    options, more = parser.parse_known_args()
    begin = time.monotonic()
    command = [
        sys.executable,
        "-m",
        "rorqual.cli",
        "compare",
        "--budget",
        options.budget,
        "--out",
        str(options.out),
        *more,
    ]
    done = subprocess.run(command)
    if done.returncode:
        return done.returncode
    tree = json.loads((options.out / "compare.json").read_text(encoding="utf-8"))
    rows = rows_of(tree, options.budget)
    kept = {key: tree[key] for key in ("budget", "sweep", "matches", "factors", "runs")}
    for run in kept["runs"]:
        del run["curve"]
    shutil.copy(options.out / "report.html", RECORDS / f"compare_{options.budget}.html")
    print(write_record(f"compare_{options.budget}", rows, seconds=time.monotonic() - begin, **kept))
    return 0


if __name__ == "__main__":
    sys.exit(main())
