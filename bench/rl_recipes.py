"""`rorqual rl --recipe countdown | functions | smollm2`: held-out accuracy before and after reinforcement, and the time.

    python bench/rl_recipes.py [--model models/smollm2] [--runs FOLDER] [--recipes countdown functions]

With --runs, runs that are finished there are read instead of made again. --model is for the recipe smollm2, which is left
out without it. Rows of recipes that are left out stay as they are recorded, with their date.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from record import RECORDS, Row, faster, read_record, write_record
from rl_sums import finished

RECIPES = ("countdown", "functions", "smollm2")


def row_of(recipe: str, lines: list[dict[str, Any]]) -> Row:
    """The lower end of accuracy's interval at the end beside the upper one of the model that was brought, or of one from
    nothing after its cold start: above 1 they do not meet."""
    judged = [x for x in lines if "accuracy" in x]
    taught = [x for x in judged if x["phase"] == "cold start"][-1]
    brought = judged[0] if judged[0]["phase"] == "before" else None
    before, end = brought or taught, lines[-1]
    apart = end["accuracy_low"] > before["accuracy_high"]
    note = f"{_interval(end)} after {_interval(before)}"
    note += f"; after the cold start {_interval(taught)}" if brought else ""
    note += f"; {end['seconds'] / 60:.1f} minutes in all" + ("" if apart else "; the intervals meet")
    name = "as it came" if brought else "before reinforcement"
    what = f"{recipe}: held-out accuracy at least, beside at most before"
    return faster(what, end["accuracy_low"], before["accuracy_high"], name, 1.0, "share", note)


def _interval(line: dict[str, Any]) -> str:
    return f"{line['accuracy']:.1%} ({line['accuracy_low']:.1%} to {line['accuracy_high']:.1%})"


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
    print(write_record("rl_recipes", [*kept({_recipe(row) for row in rows}), *rows]))


def _recipe(row: Row) -> str:
    return row.what.partition(":")[0]


def kept(new: set[str]) -> list[Row]:
    """Rows of the record that are not measured now; each says when it was."""
    if not (RECORDS / "rl_recipes.json").is_file():
        return []
    record = read_record("rl_recipes")
    rows = [Row(**row) for row in record["rows"] if _recipe(Row(**row)) not in new]
    of = f"; of {record['date']}, {record['commit']}"
    return [row if "; of 20" in row.note else replace(row, note=row.note + of) for row in rows]


if __name__ == "__main__":
    main()
