"""report.html of a reinforcement run: how accurate it became, how, and what its rollouts look like."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from rorqual.checkpoint.files import write_whole
from rorqual.config import to_dict
from rorqual.device import machine
from rorqual.model.cost import Cost
from rorqual.rl.config import RLConfig
from rorqual.train.metrics import read
from rorqual.train.plot import Curve, chart
from rorqual.train.report import STYLE
from rorqual.train.view import duration
from rorqual.verify.interval import wilson

Lines = Sequence[Mapping[str, Any]]


def write_report(config: RLConfig, bill: Cost) -> Path:
    """Write the page of a run from its metrics and return its path."""
    path = config.out / "report.html"
    write_whole(path, page(config, bill, read(config.out)))
    return path


def page(config: RLConfig, bill: Cost, lines: Lines) -> str:
    """The page as HTML; whatever a model wrote is escaped."""
    last: Mapping[str, Any] = lines[-1] if lines else {}
    m = machine()
    where = f"{m['processor']}, {m['cores']} cores, {m['memory']}"
    tasks = ", ".join(t.name for t in config.tasks)
    return "\n".join([
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{escape(config.out.name)}: reinforcement report</title><style>{STYLE}</style>",
        f"<h1>{escape(config.out.name)}</h1><p class=lead>{escape(bill.config.architecture)}, "
        f"{bill.parameters / 1e6:,.2f} M parameters, on {escape(tasks)}: {last.get('step', 0):,} steps in "
        f"{duration(last.get('seconds', 0))} on {escape(where)}</p>",
        _tiles(lines),
        "<h2>Curves</h2><div class=charts>", *_charts(lines), "</div>",
        _families(lines), _samples(lines),
        "<details><summary>The run's config</summary>",
        f"<pre>{escape(json.dumps(to_dict(config), indent=1))}</pre></details>",
    ])  # fmt: skip


def _tiles(lines: Lines) -> str:
    judged = [x for x in lines if "accuracy" in x]
    rolled = [x for x in lines if "rollouts" in x]
    tiles: dict[str, str] = {}
    if judged:
        first = next((x for x in judged if x["phase"] == "before"), judged[0])
        taught = next((x for x in reversed(judged) if x["phase"] == "cold start"), first)
        end = judged[-1]
        tiles["held-out accuracy now"] = f"{end['accuracy']:.1%}"
        tiles["its 95% interval"] = f"{end['accuracy_low']:.1%} – {end['accuracy_high']:.1%}"
        tiles["at the start"] = f"{first['accuracy']:.1%}"
        tiles["before reinforcement"] = f"{taught['accuracy']:.1%}"
    passed = [x for x in lines if "pass_k" in x]
    if passed:
        tiles[f"pass@{passed[-1]['k']}, before"] = f"{passed[0]['pass_k']:.1%}"
        tiles[f"pass@{passed[-1]['k']}, now"] = f"{passed[-1]['pass_k']:.1%}"
    if rolled:
        tiles["rollouts"] = f"{rolled[-1]['rollouts']:,}"
        tiles["rollouts a second"] = f"{rolled[-1]['rollouts_per_second']:,.0f}"
        tiles["times gone back"] = f"{sum(bool(x.get('collapsed')) for x in lines)}"
    shown = [
        f"<div class='tile{' first' if i == 0 else ''}'><b>{escape(v)}</b>{escape(k)}</div>"
        for i, (k, v) in enumerate(tiles.items())
    ]
    return f"<div class=tiles>{''.join(shown)}</div>"


def _charts(lines: Lines) -> list[str]:
    def of(key: str) -> list[tuple[float, float]]:
        return [(x["step"], x[key]) for x in lines if key in x]

    bounds = [Curve("accuracy", of("accuracy"), dots=True)]
    bounds += [Curve("95% from", of("accuracy_low")), Curve("to", of("accuracy_high"))]
    tasks = sorted({n for x in lines for n in x.get("reward_by_task", {})})
    by_task = [
        Curve(n, [(x["step"], x["reward_by_task"][n]) for x in lines if n in x.get("reward_by_task", {})])
        for n in tasks
    ]
    return [
        chart("Held-out accuracy, greedy", bounds),
        chart("Reward of rollouts", by_task),
        chart("Share of groups that teach", [Curve("live", of("live"))]),
        chart("Tokens a rollout", [Curve("length", of("length"))]),
        chart("Entropy, nats a token", [Curve("entropy", of("entropy"))]),
        chart("Sampler against trainer: divergence (k3)", [Curve("mismatch", of("mismatch"))]),
        chart("Share of tokens that the clip holds", [Curve("clipped", of("clipped"))]),
        chart("Gradient norm before clipping", [Curve("norm", of("grad_norm"))]),
        chart("Busiest expert over the mean, minus 1", [Curve("spread", of("load_spread"))]),
        chart("Rollouts a second", [Curve("rollouts", of("rollouts_per_second"))]),
    ]


def _families(lines: Lines) -> str:
    found = next((x for x in reversed(lines) if "heldout" in x), None)
    if found is None:
        return ""
    rows = []
    for name, (right, judged, failed) in found["heldout"].items():
        low, high = wilson(right, judged)
        share = right / judged if judged else 0.0
        failures = f", the grader failed on {failed}" if failed else ""
        rows.append(
            f"<tr><td>{escape(name)}<td>{share:.1%} ({low:.1%} – {high:.1%}), {right} of {judged}{failures}"
        )
    return f"<h2>Held-out problems by family</h2><table>{''.join(rows)}</table>"


def _samples(lines: Lines) -> str:
    found = next((x for x in reversed(lines) if x.get("samples")), None)
    if found is None:
        return ""
    shown = []
    for s in found["samples"][:12]:
        mark = "<i>right</i>" if s["verdict"] == "right" else f"<i class=no>{escape(s['verdict'])}</i>"
        shown.append(f"<pre class=sample>{mark}{escape(s['prompt'])}\n<b>{escape(s['completion'])}</b></pre>")
    return f"<h2>Answers and verdicts</h2><div class=samples>{''.join(shown)}</div>"
