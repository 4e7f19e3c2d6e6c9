"""`rorqual rl --recipe countdown | functions | smollm2`: held-out accuracy before and after reinforcement, and the time.

    python bench/rl_recipes.py [--model models/smollm2] [--runs FOLDER] [--recipes countdown functions]

With --runs, runs that are finished there are read instead of made again. --model is for the recipe smollm2, which is left
out without it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from record import Row, faster, write_record
from rl_sums import finished

RECIPES = ("countdown", "functions", "smollm2")


def row_of(recipe: str, lines: list[dict[str, Any]]) -> Row:
    """Accuracy at the end beside that before reinforcement; the goal is that the intervals do not meet."""
    before = next(
        x
        for x in reversed(lines)
        if x["phase"] != "reinforcement" and x["phase"] != "end" and "accuracy" in x
    )
    first = next(x for x in lines if "accuracy" in x)
    end = lines[-1]
    apart = end["accuracy_low"] > max(before["accuracy_high"], first["accuracy_high"])
    note = (
        f"{end['accuracy_low']:.1%} to {end['accuracy_high']:.1%} after {before['accuracy_low']:.1%} to "
        f"{before['accuracy_high']:.1%}; at first {first['accuracy']:.1%}; {end['seconds'] / 60:.1f} minutes in all"
        + ("" if apart else "; the intervals meet")
    )
    name = "before reinforcement"
    return faster(
        f"{recipe}: held-out accuracy", end["accuracy"], before["accuracy"], name, 1.0, "share", note
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, help="of `rorqual pull smollm2`")
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--recipes", nargs="*", default=list(RECIPES))
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as work:
        for recipe in options.recipes:
            run = (options.runs or Path(work)) / recipe
            if finished(run) is None:
                command = [sys.executable, "-m", "rorqual.cli", "rl", "--recipe", recipe, "--out", str(run)]
                if recipe == "smollm2":
                    if options.model is None:
                        continue
                    command += ["--model", str(options.model)]
                subprocess.run(command, check=True)
            lines = finished(run)
            assert lines is not None
            rows.append(row_of(recipe, lines))
            print(rows[-1], flush=True)
    print(write_record("rl_recipes", rows))


if __name__ == "__main__":
    main()
