"""What a comparison found: compare.json for machines, report.html for people, a few lines for the terminal."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from math import log10
from pathlib import Path
from typing import Any

from rorqual.checkpoint.files import write_whole
from rorqual.compare.budget import Budget
from rorqual.compare.study import Match, Point, Tried
from rorqual.config import to_dict
from rorqual.device import machine
from rorqual.train.metrics import Log
from rorqual.train.plot import Curve, chart
from rorqual.train.report import STYLE


@dataclass
class Factor:
    """What one part of the recipe is worth: FLOPs that the arm needs over FLOPs that the whole needs, seed by seed.

    `kind` is `without` (the recipe less the part) or `only` (the baseline with the part alone)."""

    part: str
    kind: str
    factors: list[float]
    point: Point


@dataclass
class Findings:
    """All that a comparison measured."""

    budget: Budget
    sweep: list[Tried] = field(default_factory=list)
    matches: dict[str, Match] = field(default_factory=dict)
    factors: list[Factor] = field(default_factory=list)
    caches: list[Point] = field(default_factory=list)
    seconds: float = 0.0

    def points(self) -> list[Point]:
        """Every point, none twice."""
        found: dict[tuple[str, int, str], Point] = {}
        for m in self.matches.values():
            for p in (m.baseline, *m.runs):
                found[p.setting, p.steps, p.results[0].folder] = p
        for p in (*(f.point for f in self.factors), *self.caches):
            found[p.setting, p.steps, p.results[0].folder] = p
        return list(found.values())

    def tree(self) -> dict[str, Any]:
        """For compare.json."""
        return {
            "budget": to_dict(self.budget),
            "machine": machine(),
            "seconds": self.seconds,
            "sweep": [_arm(t) for t in self.sweep],
            "matches": {name: match_tree(m) for name, m in self.matches.items()},
            "factors": [
                {"part": f.part, "kind": f.kind, "factors": f.factors, "losses": f.point.losses} for f in self.factors
            ],
            "runs": [asdict(r) for p in self.points() for r in p.results],
        }  # fmt: skip


def _arm(t: Tried) -> dict[str, float]:
    """One arm of the search for the baseline."""
    b = t.budget
    return {
        "lr": b.lr, "embedding_lr": b.embedding_lr, "head_lr": b.head_lr, "depth": b.depth, "steps": b.steps,
        "loss": t.result.loss,
    }  # fmt: skip


def match_tree(m: Match) -> dict[str, Any]:
    """A comparison: the target, every point, where it passes and what it saves."""
    return {
        "baseline": m.baseline.setting,
        "baseline_steps": m.baseline.steps,
        "target_loss": m.baseline.loss,
        "baseline_losses": m.baseline.losses,
        "recipe": m.runs[0].setting,
        "runs": [
            {"steps": p.steps, "losses": p.losses, "passes": p.reaches(m.baseline.loss)} for p in m.runs
        ],
        "passing_steps": None if m.passing is None else m.passing.steps,
        "factors": m.factors,
    }


def summary(found: Findings) -> list[str]:
    """The findings in lines."""
    lines = []
    for name, m in found.matches.items():
        head = f"{name}: {m.baseline.setting} reaches {m.baseline.loss:.4f} in {m.baseline.steps:,} steps"
        if m.passing is None:
            low = min(max(p.losses) for p in m.runs)
            lines.append(
                f"{head}; {m.runs[0].setting} does not within the steps tried (worst seed of its best: {low:.4f})"
            )
            continue
        f = m.factors
        memory = (
            f"{f['memory']:.2f}x less memory" if f["memory"] >= 1 else f"{1 / f['memory']:.2f}x the memory"
        )
        lines.append(
            f"{head}; {m.passing.setting} in {m.passing.steps:,} on every seed: {f['tokens']:.2f}x fewer tokens, "
            f"{f['FLOPs']:.2f}x fewer FLOPs, {f['seconds']:.2f}x fewer processor seconds, {memory}"
        )
    for factor in found.factors:
        low, high = min(factor.factors), max(factor.factors)
        word = "without" if factor.kind == "without" else "only"
        lines.append(
            f"{word} {factor.part}: worth {sum(factor.factors) / len(factor.factors):.2f}x ({low:.2f} to {high:.2f})"
        )
    return lines


def write(found: Findings, out: Path) -> None:
    """Write compare.json and report.html."""
    out.mkdir(parents=True, exist_ok=True)
    write_whole(out / "compare.json", json.dumps(found.tree(), indent=1) + "\n")
    write_whole(out / "report.html", page(found))


def log(found: Findings, steps: int, out: Path) -> None:
    """A line of metrics.jsonl for each number of steps that was asked for, by which a lab ranks comparisons: how many
    times fewer FLOPs the recipe needs (0: it does not pass) and the best of its losses that every seed reaches."""
    for match in list(found.matches.values())[:1]:
        factor = match.factors.get("FLOPs", 0.0)
        best = min(max(p.losses) for p in match.runs)
        with Log(out, steps - 1) as lines:
            lines.write({"step": steps, "flops_factor": factor, "best_loss": best})


def page(found: Findings) -> str:
    """The page, self-contained."""
    m = machine()
    where = f"{m['processor']}, {m['cores']} cores, {m['memory']}"
    b = found.budget
    return "\n".join([
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Comparison</title><style>{STYLE} td.n {{ text-align: right; }}</style>",
        f"<h1>How much less the recipe needs</h1><p class=lead>Budget {escape(b.name)}: width {b.width}, {b.steps:,} "
        f"steps of {b.tokens_per_step:,} tokens for the baseline, which has {b.depth} layers; {b.seeds} seeds; "
        f"{escape(where)}</p>",
        _tiles(found),
        "<h2>Held-out loss against training FLOPs</h2><div class=charts>",
        chart("Loss at the end of each run; log10 of its FLOPs", _ends(found)),
        chart("Loss along the runs of seed 0; log10 of FLOPs", _curves(found)),
        chart("Loss at the end of each run; log10 of its seconds on one core", _ends(found, seconds=True)),
        chart("Loss against cache bytes a token", _caches(found)),
        "</div>",
        "<h2>Passing points</h2>",
        "<p>The recipe always runs its whole schedule; it passes at the fewest steps at which every seed reaches the "
        "mean final loss of the baseline's seeds.</p>",
        *(_match(name, match) for name, match in found.matches.items()),
        _factors(found.factors),
        "<h2>The search for the baseline</h2>",
        _table(
            ["rates of matrices", "of embeddings", "of the head", "layers", "steps", "held-out loss"],
            [[f"{x:g}" for x in list(_arm(t).values())[:-1]] + [f"{t.result.loss:.4f}"] for t in found.sweep],
        ),
        "<h2>What each setting is made of</h2>",
        _table(["setting", "parameters", "active", "in tables", "cache bytes a token", "optimizer's share of FLOPs"], [
            [p.setting, f"{p.results[0].parameters:,}", f"{p.results[0].active:,}", f"{p.results[0].tables:,}",
             f"{p.results[0].cache_bytes:,.0f}", f"{p.results[0].optimizer_flops / p.results[0].flops:.1%}"]
            for p in {p.setting: p for p in found.points()}.values()
        ]),
    ])  # fmt: skip


def _tiles(found: Findings) -> str:
    tiles = []
    for name, m in found.matches.items():
        if m.passing is not None:
            tiles += [
                (f"{m.factors['FLOPs']:.1f}x", f"fewer FLOPs, {name}"),
                (f"{m.factors['seconds']:.1f}x", f"fewer processor seconds, {name}"),
            ]
        else:
            tiles.append(("–", f"{name}: not passed"))
    shown = [
        f"<div class='tile{' first' if i == 0 else ''}'><b>{escape(v)}</b>{escape(k)}</div>"
        for i, (v, k) in enumerate(tiles)
    ]
    return f"<div class=tiles>{''.join(shown)}</div>"


def _by_setting(points: Sequence[Point]) -> Mapping[str, list[Point]]:
    found: dict[str, list[Point]] = {}
    for p in points:
        found.setdefault(p.setting, []).append(p)
    return found


def _ends(found: Findings, seconds: bool = False) -> list[Curve]:
    return [
        Curve(name, sorted((log10(p.seconds if seconds else p.flops), p.loss) for p in points), dots=True)
        for name, points in _by_setting(found.points()).items()
    ]


def _curves(found: Findings) -> list[Curve]:
    curves = []
    for p in found.points():
        r = p.results[0]
        each = r.flops / r.steps
        curves.append(Curve(f"{p.setting} {p.steps:,}", [(log10(each * s), loss) for s, loss in r.curve]))
    return curves[:6]


def _caches(found: Findings) -> list[Curve]:
    return [Curve(p.setting, [(p.results[0].cache_bytes, p.loss)], dots=True) for p in found.caches]


def _match(name: str, m: Match) -> str:
    rows = [[m.baseline.setting, f"{m.baseline.steps:,}", _losses(m.baseline), f"{m.baseline.flops:.3e}",
             f"{m.baseline.seconds:.0f}", f"{m.baseline.bytes / 1e6:,.0f}", "the target"]]  # fmt: skip
    for p in m.runs:
        word = "passes" if p.reaches(m.baseline.loss) else "does not pass"
        if p is m.passing:
            word = "passes: " + ", ".join(f"{v:.2f}x {k}" for k, v in m.factors.items())
        rows.append(
            [
                p.setting,
                f"{p.steps:,}",
                _losses(p),
                f"{p.flops:.3e}",
                f"{p.seconds:.0f}",
                f"{p.bytes / 1e6:,.0f}",
                word,
            ]
        )
    heads = ["setting", "steps", "held-out loss of each seed", "FLOPs", "seconds", "MB", ""]
    return f"<h3>{escape(name)}</h3>{_table(heads, rows)}"


def _losses(p: Point) -> str:
    return ", ".join(f"{x:.4f}" for x in p.losses)


def _factors(factors: Sequence[Factor]) -> str:
    if not factors:
        return ""
    rows = [
        [f"{f.kind} {f.part}", f"{sum(f.factors) / len(f.factors):.2f}x", f"{min(f.factors):.2f} to {max(f.factors):.2f}",
         _losses(f.point)]
        for f in factors
    ]  # fmt: skip
    note = (
        "<p>FLOPs that the arm would need for the same loss, over those of the whole (without), or FLOPs of the baseline "
        "over the arm's (only): read off the line through the measured points of recipe or baseline over log steps.</p>"
    )
    return f"<h2>What each part is worth</h2>{note}{_table(['arm', 'factor', 'over seeds', 'losses'], rows)}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(h)}" for h in heads)
    body = "".join("<tr>" + "".join(f"<td>{escape(c)}" for c in row) for row in rows)
    return f"<table><tr>{head}{body}</table>"
