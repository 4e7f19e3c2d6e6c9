"""report.html of a run: curves, figures, samples and the config in one file that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rorqual.config import to_dict
from rorqual.device import machine
from rorqual.model.cost import Cost
from rorqual.train.config import TrainConfig
from rorqual.train.metrics import duration, read

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --a: #1971c2; --b: #e8590c; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10rem, 1fr)); gap: .7rem; }
.tile { background: var(--soft); border-radius: .5rem; padding: .7rem .9rem; } .tile b { display: block;
font-size: 1.3rem; font-variant-numeric: tabular-nums; }
svg { width: 100%; height: auto; } svg text { font: 11px system-ui, sans-serif; fill: currentColor; opacity: .75; }
.grid { stroke: var(--line); } .a { fill: none; stroke: var(--a); stroke-width: 1.5; }
.b { fill: none; stroke: var(--b); stroke-width: 2.5; } .dot { fill: var(--b); }
pre { background: var(--soft); padding: .7rem; border-radius: .4rem; white-space: pre-wrap; font-size: 12.5px; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(26rem, 1fr)); gap: 1rem; }
summary { cursor: pointer; }
"""


def write_report(
    run: Path, config: TrainConfig, cost: Cost, samples: Sequence[str], parsed: float | None
) -> Path:
    """Write the page of a run from its metrics and return its path."""
    path = run / "report.html"
    path.write_text(page(run, config, cost, samples, parsed), encoding="utf-8")
    return path


def page(run: Path, config: TrainConfig, cost: Cost, samples: Sequence[str], parsed: float | None) -> str:
    """The page as HTML; samples are escaped."""
    lines = read(run)
    heldout = [(x["step"], x["heldout_bpb"]) for x in lines if "heldout_bpb" in x]
    last: Mapping[str, Any] = lines[-1] if lines else {"step": 0}
    tokens = last["step"] * config.tokens_per_step
    tiles = {
        "held-out bits per byte": f"{heldout[-1][1]:.3f}" if heldout else "–",
        "tokens trained": f"{tokens:,}",
        "parameters": f"{cost.parameters / 1e6:,.1f} M",
        "active parameters": f"{cost.active / 1e6:,.1f} M",
        "tokens a second": f"{last.get('tokens_per_second', 0):,.0f}",
        "share of peak (MFU)": f"{last['mfu']:.0%}" if last.get("mfu") else "–",
        "training FLOPs": f"{cost.train_flops(config.seq_len) * tokens:.2e}",
        "cache of a token": f"{cost.cache_bytes():,.0f} B in bf16",
    }
    if parsed is not None:
        tiles["samples that parse as Python"] = f"{parsed:.0%}"
    seconds = tokens / last["tokens_per_second"] if last.get("tokens_per_second") else 0
    m = machine()
    curves = [
        ("Loss (nats a token)", [(x["step"], x["loss"]) for x in lines if "loss" in x], []),
        ("Held-out bits per byte", [], heldout),
        (
            "Expert load spread (0: even)",
            [(x["step"], x["load_spread"]) for x in lines if "load_spread" in x],
            [],
        ),
        ("Gradient norm", [(x["step"], x["grad_norm"]) for x in lines if "grad_norm" in x], []),
    ]
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{escape(run.name)}</title><style>{_STYLE}</style><h1>{escape(run.name)}</h1>",
        f"<p>{escape(cost.config.architecture)}, {last['step']} of {config.steps} steps in {duration(seconds)} on "
        f"{escape(str(m['processor']))}, {m['cores']} cores</p>",
        "<div class=tiles>",
        *(f"<div class=tile>{escape(k)}<b>{escape(v)}</b></div>" for k, v in tiles.items()),
        "</div><h2>Curves</h2><div class=two>",
        *(f"<figure><figcaption>{t}</figcaption>{plot(a, b)}</figure>" for t, a, b in curves if a or b),
        "</div><h2>Samples</h2>",
        *(f"<pre>{escape(s)}</pre>" for s in samples),
        "<h2>Config</h2><details><summary>the run</summary><pre>",
        escape(json.dumps(to_dict(config), indent=1)),
        "</pre></details><details><summary>the model</summary><pre>",
        escape(json.dumps(cost.config.to_hf(), indent=1)),
        "</pre></details>",
    ]
    return "\n".join(parts)


Points = Sequence[tuple[float, float]]


def plot(thin: Points, thick: Points, width: int = 460, height: int = 220) -> str:
    """One chart as SVG: a thin line of many points, a thick one with dots."""
    points = [p for p in (*thin, *thick) if p[1] == p[1] and abs(p[1]) != float("inf")]
    if not points:
        return ""
    x0, x1 = min(p[0] for p in points), max(p[0] for p in points)
    ys = sorted(p[1] for p in points)
    y0, y1 = (
        ys[0],
        ys[min(len(ys) - 1, int(len(ys) * 0.995))],
    )  # the first steps' spikes would flatten the rest
    if y0 == y1:
        y0, y1 = y0 - 0.5, y1 + 0.5
    left, bottom = 46, height - 22

    def place(p: tuple[float, float]) -> tuple[float, float]:
        x = left + (width - left - 8) * ((p[0] - x0) / (x1 - x0 or 1))
        y = bottom - (bottom - 8) * (min(max(p[1], y0), y1) - y0) / (y1 - y0)
        return round(x, 1), round(y, 1)

    out = [f"<svg viewBox='0 0 {width} {height}' role=img>"]
    for i in range(5):
        value = y0 + (y1 - y0) * i / 4
        _, y = place((x0, value))
        out.append(
            f"<line class=grid x1={left} x2={width - 8} y1={y} y2={y} /><text x=2 y={y + 4}>{value:.3g}</text>"
        )
    for value in (x0, (x0 + x1) / 2, x1):
        x, _ = place((value, y0))
        out.append(f"<text x={x} y={height - 6} text-anchor=middle>{value:,.0f}</text>")
    for name, line in (("a", _thin(thin)), ("b", thick)):
        if line:
            path = " ".join(f"{x},{y}" for x, y in map(place, line))
            out.append(f"<polyline class={name} points='{path}' />")
    out += [f"<circle class=dot cx={x} cy={y} r=3 />" for x, y in map(place, thick)]
    return "".join(out) + "</svg>"


def _thin(points: Points, most: int = 500) -> Points:
    """At most so many points, by means of neighbours."""
    step = -(-len(points) // most)
    if step <= 1:
        return points
    groups = [points[i : i + step] for i in range(0, len(points), step)]
    return [(g[-1][0], sum(p[1] for p in g) / len(g)) for g in groups]
