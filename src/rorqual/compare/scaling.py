"""Loss against compute over a ladder of small runs: a power law for each setting, what it predicts, and whether it did.

log(loss) = a + b log(FLOPs), by least squares over all runs of all rungs but the largest, which is held back: the fit
predicts it first and is then judged by it. Intervals are those of a new run under the fit (Student's t).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, log, log10, sqrt
from pathlib import Path
from statistics import mean
from typing import Any

from rorqual.checkpoint.files import write_whole
from rorqual.compare.budget import Budget
from rorqual.compare.report import match_tree
from rorqual.compare.study import Match, Point
from rorqual.device import machine
from rorqual.train.plot import Curve, chart
from rorqual.train.report import STYLE

# 97.5% points of Student's t by degrees of freedom; beyond them 2.1 errs to the wide side.
T_975 = {1: 12.71, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262, 10: 2.228}


@dataclass(frozen=True)
class Law:
    """loss = exp(a) FLOPs^b with what its intervals need."""

    a: float
    b: float
    spread: float  # of residuals of log loss
    count: int
    center: float  # mean of log FLOPs
    square: float  # sum of squared distances from it

    def predict(self, flops: float) -> tuple[float, float, float]:
        """(loss, low, high) of one new run at this compute, at 95%."""
        x = log(flops)
        middle = self.a + self.b * x
        t = T_975.get(self.count - 2, 2.1)
        width = t * self.spread * sqrt(1 + 1 / self.count + (x - self.center) ** 2 / self.square)
        return exp(middle), exp(middle - width), exp(middle + width)


def fit(points: Sequence[tuple[float, float]]) -> Law:
    """The law through (FLOPs, loss) of three runs or more at two computes or more."""
    xs, ys = [log(x) for x, _ in points], [log(y) for _, y in points]
    mx, my = mean(xs), mean(ys)
    square = sum((x - mx) ** 2 for x in xs)
    b = sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / square
    a = my - b * mx
    left = sum((y - a - b * x) ** 2 for x, y in zip(xs, ys, strict=True))
    return Law(a, b, sqrt(left / max(len(xs) - 2, 1)), len(xs), mx, square)


def ladder(top: Budget, rungs: int, ratio: float) -> list[Budget]:
    """Budgets of growing width, the same depth and tokens per weight of the layers; widths are multiples of 16."""
    from dataclasses import replace

    out = []
    for i in range(rungs):
        width = max(16, round(top.width * ratio**i / 16) * 16)
        steps = round(top.steps * (width / top.width) ** 2)
        out.append(replace(top, name=f"rung {i + 1}", width=width, steps=steps))
    return out


@dataclass(frozen=True)
class Ladder:
    """One setting's rungs, the smallest first; the last is the one held back."""

    name: str
    points: tuple[Point, ...]

    @property
    def law(self) -> Law:
        return fit([(r.flops, r.loss) for p in self.points[:-1] for r in p.results])

    @property
    def verdict(self) -> dict[str, Any]:
        """The prediction for the held-back rung beside what it gave, and for ten times its compute."""
        top = self.points[-1]
        predicted, low, high = self.law.predict(top.flops)
        further = fit([(r.flops, r.loss) for p in self.points for r in p.results]).predict(top.flops * 10)
        return {
            "flops": top.flops, "predicted": predicted, "low": low, "high": high, "measured": top.loss,
            "held": low <= top.loss <= high, "exponent": self.law.b, "at_10x": further,
        }  # fmt: skip


def summary(ladders: Sequence[Ladder], matches: Sequence[Match]) -> list[str]:
    """A line a rung, measured; then a line or two a fit."""
    lines = []
    for i, m in enumerate(matches, 1):
        base, factors = m.baseline, m.factors
        found = f"{factors['FLOPs']:.2f}x fewer FLOPs" if m.passing else "does not reach it"
        lines.append(
            f"rung {i}: {base.setting} reaches {base.loss:.4f} in {base.steps:,} steps; recipe: {found}"
        )
    for ladder in ladders:
        v = ladder.verdict
        loss, low, high = v["at_10x"]
        lines.append(
            f"{ladder.name}: loss falls as FLOPs^{v['exponent']:.4f}; held-back rung of {v['flops']:.1e} FLOPs: "
            f"predicted {v['predicted']:.3f} ({v['low']:.3f} to {v['high']:.3f}), measured {v['measured']:.3f}: "
            f"{'inside' if v['held'] else 'OUTSIDE'}; at ten times that: {loss:.3f} ({low:.3f} to {high:.3f})"
        )
    if len(ladders) == 2:
        lines += [
            f"{ladders[1].name} against {ladders[0].name}: "
            + "; ".join(f"{f:.2f}x fewer FLOPs at {c:.1e}" for c, f in gains(*ladders))
        ]
    return lines


def gains(base: Ladder, other: Ladder) -> list[tuple[float, float]]:
    """(FLOPs of the base, how many times less the other needs for its loss) at each rung and at ten times the last,
    by the other's law."""
    law = fit([(r.flops, r.loss) for p in other.points for r in p.results])
    own = fit([(r.flops, r.loss) for p in base.points for r in p.results])
    at = [(p.flops, p.loss) for p in base.points]
    at.append((base.points[-1].flops * 10, own.predict(base.points[-1].flops * 10)[0]))
    return [(flops, flops / exp((log(loss) - law.a) / law.b)) for flops, loss in at]


def _rungs(x: Ladder) -> list[dict[str, Any]]:
    return [
        {"run": r.folder, "steps": r.steps, "flops": r.flops, "loss": r.loss, "seed": r.seed}
        for p in x.points
        for r in p.results
    ]


def write(ladders: Sequence[Ladder], matches: Sequence[Match], out: Path) -> None:
    """Write scaling.json and scaling.html."""
    out.mkdir(parents=True, exist_ok=True)
    tree = {
        "machine": machine(),
        "ladders": [{"setting": x.name, "verdict": x.verdict, "rungs": _rungs(x)} for x in ladders],
        "matches": [match_tree(m) for m in matches],
        "gains": gains(*ladders) if len(ladders) == 2 else [],
    }  # fmt: skip
    write_whole(out / "scaling.json", json.dumps(tree, indent=1) + "\n")
    curves = [Curve(x.name, [(log10(p.flops), log10(p.loss)) for p in x.points], dots=True) for x in ladders]
    for x in ladders:
        ends = [x.points[0].flops, x.points[-1].flops * 10]
        curves.append(Curve(f"law of {x.name}", [(log10(c), log10(x.law.predict(c)[0])) for c in ends]))
    lines = "".join(f"<p>{line}</p>" for line in summary(ladders, matches))
    write_whole(
        out / "scaling.html",
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Scaling</title><style>{STYLE}</style><h1>Loss against compute</h1>{lines}"
        f"<div class=charts>{chart('log10 of held-out loss; log10 of training FLOPs', curves)}</div>",
    )
