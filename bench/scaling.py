"""How the recipe's factor moves with the size of the model: `rorqual scaling`, and its record.

python bench/scaling.py --out runs/scaling       # more options go to the command; runs that are there are not repeated
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from record import Row, write_record


def rows_of(tree: dict[str, Any]) -> list[Row]:
    """The factor at each rung and at ten times the last, and each setting's prediction of the rung held back."""
    base = tree["ladders"][0]
    rows = []
    for i, (flops, factor) in enumerate(tree["gains"]):
        runs = [r for r in base["rungs"] if r["flops"] == flops]
        what = f"a run of {flops:.1e} FLOPs" if runs else f"predicted at {flops:.1e} FLOPs"
        note = (
            f"rung {i + 1}: {runs[0]['steps']:,} steps" if runs else "by both laws, ten times the last rung"
        )
        rows.append(
            Row(f"scaling, {what}: FLOPs", factor, 1.0, base["setting"], factor, None, "x less", note)
        )
    for x in tree["ladders"]:
        v = x["verdict"]
        verdict = "inside" if v["held"] else "outside"
        note = f"predicted {v['predicted']:.3f}, {v['low']:.3f} to {v['high']:.3f}: {verdict}"
        law = f"FLOPs^{v['exponent']:.3f}"
        rows.append(
            Row(f"scaling, {x['setting']}: loss held back", v["measured"], None, law, unit="nats", note=note)
        )
    return rows


def main() -> int:
    """Run the command, then write its findings as a record."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/scaling"))
    options, more = parser.parse_known_args()
    begin = time.monotonic()
    command = [sys.executable, "-m", "rorqual.cli", "scaling", "--out", str(options.out), *more]
    done = subprocess.run(command)
    if done.returncode:
        return done.returncode
    tree = json.loads((options.out / "scaling.json").read_text(encoding="utf-8"))
    found = {key: tree[key] for key in ("ladders", "gains")}
    print(write_record("scaling", rows_of(tree), seconds=time.monotonic() - begin, **found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
