"""How the recipe's factor moves with the size of the model: `rorqual scaling`, and its record.

python bench/scaling.py --rungs 4 --seeds 3 --rounds 2    # more options go to the command; runs that are there are kept
"""

from __future__ import annotations

import argparse
import itertools
import json
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from record import RECORDS, Row, write_record


def rows_of(tree: dict[str, Any]) -> list[Row]:
    """What was measured at each rung, then what the fits make of it, and each fit's prediction of the rung held back."""
    base, other = ([_rung(runs) for _, runs in _by_steps(x["rungs"])] for x in tree["ladders"])
    rows = []
    for i, ((steps, flops, theirs), (own, ours_flops, ours)) in enumerate(zip(base, other, strict=True)):
        note = f"{own:,} steps and {flops / ours_flops:.2f}x fewer FLOPs against {steps:,}; worst seed against best"
        what = f"scaling, rung {i + 1}: loss below the baseline's"
        rows.append(Row(what, min(theirs) - max(ours), None, "", unit="nats", note=note))
    for i, m in enumerate(tree["matches"], 1):
        at = m["passing_steps"]
        note = f"{at:,} of" if at else "not passed in the steps tried,"
        note += f" {m['baseline_steps']:,} steps, loss {m['target_loss']:.4f}"
        factor = m["factors"].get("FLOPs", 0.0)
        what = f"scaling, rung {i}: FLOPs, measured"
        rows.append(Row(what, factor, 1.0, m["baseline"], factor, None, "x less", note))
    for flops, factor in tree["gains"]:
        what = f"scaling, by the fits at {flops:.1e} FLOPs of the baseline"
        rows.append(Row(what, factor, 1.0, tree["ladders"][0]["setting"], factor, None, "x less"))
    for x in tree["ladders"]:
        v = x["verdict"]
        verdict = "inside" if v["held"] else "outside"
        note = f"predicted {v['predicted']:.3f}, {v['low']:.3f} to {v['high']:.3f}: {verdict}"
        law = f"FLOPs^{v['exponent']:.3f}"
        rows.append(
            Row(f"scaling, {x['setting']}: loss held back", v["measured"], None, law, unit="nats", note=note)
        )
    return rows


def _by_steps(runs: list[dict[str, Any]]) -> Iterable[tuple[int, list[dict[str, Any]]]]:
    for steps, some in itertools.groupby(runs, key=lambda r: int(r["steps"])):
        yield steps, list(some)


def _rung(runs: list[dict[str, Any]]) -> tuple[int, float, list[float]]:
    """Steps, FLOPs and each seed's loss."""
    return runs[0]["steps"], runs[0]["flops"], [r["loss"] for r in runs]


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
    found = {key: tree[key] for key in ("ladders", "matches", "gains")}
    shutil.copy(options.out / "scaling.html", RECORDS / "scaling.html")
    print(write_record("scaling", rows_of(tree), seconds=time.monotonic() - begin, **found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
