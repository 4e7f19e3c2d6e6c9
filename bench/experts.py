"""From what budget fine-grained experts pay: in the recipe at full depth and in its core, which looks nothing up.

python bench/experts.py            # --steps 4000 and more go on; runs that are there are not computed again

Dense and with experts they have the same active parameters but for the router, and run their whole schedule at every
point. The factor is how many times the FLOPs (the optimizer's included) the dense model needs for the loss of the one
with experts, on the line through its own points over log FLOPs.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from math import exp, log, log10
from pathlib import Path

from record import RECORDS, Row, write_record

from rorqual.compare.budget import Budget
from rorqual.compare.pool import Pool
from rorqual.compare.pools import built_pool
from rorqual.compare.setting import RECIPE, Setting
from rorqual.compare.study import Point, Pools, Study
from rorqual.train.plot import Curve, chart
from rorqual.train.report import STYLE

DENSE = Setting("dense", tuple(p for p in RECIPE.parts if p != "shallow"))
CORE = Setting("core", ("muon", "wsd", "zero-output"))
PAIRS = {
    "core": (CORE, CORE.plus("core with experts", ("experts",))),
    "recipe": (DENSE, DENSE.plus("with experts", ("experts",))),
}


def flops_at(loss: float, points: list[Point]) -> float:
    """What a setting needs for a loss: between its points, or beyond its last two."""
    after = next((i for i, p in enumerate(points) if p.loss <= loss), len(points) - 1)
    a, b = points[max(after, 1) - 1], points[max(after, 1)]
    x, y = log(a.flops), log(b.flops)
    return exp(x + (y - x) * (loss - a.loss) / (b.loss - a.loss))


def rows_of(name: str, dense: list[Point], experts: list[Point]) -> list[Row]:
    """A row a number of steps."""
    rows = []
    for d, e in zip(dense, experts, strict=True):
        first = d.results[0]
        factor = flops_at(e.loss, dense) / e.flops
        note = f"loss {e.loss:.4f} in {e.flops:.2e} FLOPs, dense {d.loss:.4f} in {d.flops:.2e}"
        note += f"; {e.seconds / d.seconds:.2f}x its processor seconds"
        rows.append(
            Row(
                f"experts in the {name} at {first.tokens / first.active:.0f} tokens an active weight: FLOPs",
                factor, 1.0, d.setting, factor, None, "x less", note,
            )
        )  # fmt: skip
    return rows


def main() -> int:
    """Train, write the record and the chart beside it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/experts"))
    parser.add_argument("--data", type=Path, help="a folder of `rorqual data build`; built otherwise")
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--steps", type=int, nargs="+", default=[250, 500, 1000, 2000])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2)
    o = parser.parse_args()
    begin = time.monotonic()
    budget = dataclasses.replace(Budget(), depth=3, width=o.width, seeds=o.seeds, control_seeds=1)
    data = o.data or built_pool(o.out / "data", budget, ("python",), print)
    with Pool(o.workers, print) as pool:
        study = Study(budget, Pools(data, o.out / "runs"), pool)
        settings = [s for pair in PAIRS.values() for s in pair]
        pool.all(study.job(s, n, seed) for n in o.steps for seed in range(o.seeds) for s in settings)
        points = [[study.point(s, n, o.seeds) for n in o.steps] for s in settings]
    curves = [Curve(p[0].setting, [(log10(x.flops), x.loss) for x in p], dots=True) for p in points]
    page = chart("Held-out loss at the end of each run; log10 of its FLOPs", curves)
    (RECORDS / "experts.html").write_text(
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Experts</title><style>{STYLE}</style><h1>Dense, and with experts</h1><div class=charts>{page}</div>\n",
        encoding="utf-8",
    )
    runs = [dataclasses.asdict(r) for some in points for p in some for r in p.results]
    for run in runs:
        del run["curve"]
    pairs = zip(PAIRS, points[::2], points[1::2], strict=True)
    rows = [row for name, dense, experts in pairs for row in rows_of(name, dense, experts)]
    print(write_record("experts", rows, seconds=time.monotonic() - begin, runs=runs))
    return 0


if __name__ == "__main__":
    sys.exit(main())
