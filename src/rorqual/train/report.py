"""report.html of a run: outcome, curves, cost, samples and config in one file that needs nothing else."""

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
from rorqual.train.bill import option_lines
from rorqual.train.candidates import share_of
from rorqual.train.config import TrainConfig
from rorqual.train.metrics import read
from rorqual.train.plot import Curve, chart
from rorqual.train.sample import TEMPERATURE, parses
from rorqual.train.view import duration

Lines = Sequence[Mapping[str, Any]]

STYLE = """
:root { color-scheme: light dark; --ink: #16202a; --page: #fbfcfd; --card: #fff; --line: #8883; --soft: #6b7785;
--c0: #1864ab; --c1: #e8590c; --c2: #2b8a3e; --c3: #862e9c; --c4: #c92a2a; --c5: #5c940d; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6ebf0; --page: #10161c; --card: #18212a; --soft: #93a1af;
--c0: #74c0fc; --c1: #ffa94d; --c2: #8ce99a; --c3: #e599f7; --c4: #ff8787; --c5: #c0eb75; } }
* { box-sizing: border-box; }
body { font: 15px/1.55 system-ui, sans-serif; color: var(--ink); background: var(--page); max-width: 72rem;
margin: 0 auto; padding: 2rem 1.2rem 4rem; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.1rem; margin: 2.4rem 0 .8rem; }
p.lead { color: var(--soft); margin: .3rem 0 1.4rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(10.5rem, 1fr)); gap: .7rem; }
.tile, figure, .sample, details, table { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
.tile { padding: .7rem .9rem; color: var(--soft); font-size: .82rem; }
.tile b { display: block; color: var(--ink); font-size: 1.35rem; font-variant-numeric: tabular-nums; }
.tile.first { border-color: var(--c0); }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr)); gap: .9rem; }
figure { margin: 0; padding: .7rem .8rem .3rem; } figcaption { font-size: .88rem; color: var(--soft); }
figcaption b { color: var(--ink); float: right; font-variant-numeric: tabular-nums; }
.key { margin-left: .8rem; } .key::before { content: "— "; font-weight: bold; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--soft); } .grid { stroke: var(--line); }
.curve { fill: none; stroke: currentColor; stroke-width: 1.6; stroke-linejoin: round; }
.dot { fill: currentColor; }
.c0 { color: var(--c0); } .c1 { color: var(--c1); } .c2 { color: var(--c2); } .c3 { color: var(--c3); }
.c4 { color: var(--c4); } .c5 { color: var(--c5); }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-variant-numeric: tabular-nums; }
td { padding: .4rem .9rem; border-top: 1px solid var(--line); } tr:first-child td { border-top: 0; }
td:first-child { color: var(--soft); width: 22rem; }
.samples { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(30rem, 100%), 1fr)); gap: .9rem; }
.sample { margin: 0; padding: .6rem .9rem; font-size: 12px; line-height: 1.45; overflow: auto; white-space: pre; }
.sample i { float: right; font-style: normal; color: var(--c2); } .sample i.no { color: var(--c4); }
details { padding: .6rem .9rem; margin-top: .7rem; } summary { cursor: pointer; }
details pre { overflow: auto; font-size: 12px; }
"""


def write_report(config: TrainConfig, bill: Cost) -> Path:
    """Write the page of a run from its metrics and return its path."""
    path = config.out / "report.html"
    write_whole(path, page(config, bill, read(config.out)))
    return path


def page(config: TrainConfig, bill: Cost, lines: Lines) -> str:
    """The page as HTML; whatever a model wrote is escaped."""
    last: Mapping[str, Any] = lines[-1] if lines else {"step": 0}
    m = machine()
    where = f"{m['processor']}, {m['cores']} cores, {m['memory']}"
    family = "latent attention" if bill.config.attention == "mla" else "grouped-query attention"
    family += f", {bill.config.n_routed_experts} experts" if bill.config.n_routed_experts else ", dense"
    return "\n".join([
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>{escape(config.out.name)}: training report</title><style>{STYLE}</style>",
        f"<h1>{escape(config.out.name)}</h1><p class=lead>{escape(bill.config.architecture)} ({family}): "
        f"{last['step']:,} of {config.steps:,} steps in {duration(last.get('seconds', 0))} on {escape(where)}</p>",
        _tiles(config, bill, lines),
        "<h2>Curves</h2><div class=charts>", *_charts(lines), "</div>",
        "<h2>Cost</h2>", _table(_cost_rows(config, bill, last)),
        _samples(lines),
        "<h2>How it was made</h2>", _table(_machine_rows(m)),
        _details("The run's config", to_dict(config)),
        _details("The model's config.json", bill.config.to_hf()),
    ])  # fmt: skip


def _tiles(config: TrainConfig, bill: Cost, lines: Lines) -> str:
    last: Mapping[str, Any] = lines[-1] if lines else {}
    bits = [x["heldout_bpb"] for x in lines if "heldout_bpb" in x]
    share = share_of(last, bill.config.vocab_size)
    tiles = {
        "held-out bits per byte": f"{bits[-1]:.3f}" if bits else "–",
        "parameters": _millions(bill.parameters),
        "active a token": _millions(bill.active),
        "tokens trained": f"{last.get('tokens', 0) / 1e6:,.1f} M",
        "training FLOPs": f"{bill.train_flops(config.seq_len, share) * last.get('tokens', 0):.2e}",
        "tokens a second": f"{last.get('tokens_per_second', 0):,.0f}",
        "of the machine's peak": f"{last['mfu']:.0%}" if "mfu" in last else "–",
        "time": duration(last.get("seconds", 0)),
    }
    if "parsed" in last:
        tiles["of samples parse as Python"] = f"{last['parsed']:.0%}"
    shown = [
        f"<div class='tile{' first' if i == 0 else ''}'><b>{escape(v)}</b>{escape(k)}</div>"
        for i, (k, v) in enumerate(tiles.items())
    ]
    return f"<div class=tiles>{''.join(shown)}</div>"


def _charts(lines: Lines) -> list[str]:
    def of(key: str) -> list[tuple[float, float]]:
        return [(x["step"], x[key]) for x in lines if key in x]

    layers = max((len(x.get("load_spreads", ())) for x in lines), default=0)
    spreads = [
        Curve(f"{i + 1}", [(x["step"], x["load_spreads"][i]) for x in lines if "load_spreads" in x])
        for i in range(layers)
    ]
    return [
        chart(
            "Loss, nats a token",
            [Curve("training", of("loss")), Curve("held-out", of("heldout_loss"), dots=True)],
        ),
        chart("Held-out bits per byte", [Curve("held-out", of("heldout_bpb"), dots=True)]),
        chart("Busiest expert over the mean, minus 1; MoE layer", spreads),
        chart("Balance loss without its coefficient, all layers", [Curve("balance", of("balance_loss"))]),
        chart("Loss of multi-token prediction", [Curve("mtp", of("mtp_loss"))]),
        chart("Gradient norm before clipping", [Curve("norm", of("grad_norm"))]),
        chart("Share of the full rate", [Curve("rate", of("rate"))]),
        chart("Tokens a second", [Curve("tokens/s", of("tokens_per_second"))]),
    ]


def _cost_rows(config: TrainConfig, bill: Cost, last: Mapping[str, Any]) -> list[tuple[str, str]]:
    c = bill.config
    heads = bill.cache_elements_with(c.num_attention_heads)
    rows = [
        ("parameters", f"{bill.parameters:,}"),
        ("active parameters a token", f"{bill.active:,}"),
        ("training FLOPs a token", f"{bill.train_flops(config.seq_len, config.softmax_share):,.0f}"),
        ("cache of a token", f"{bill.cache_bytes():,.0f} bytes in bfloat16; {heads / bill.cache_elements:.1f} times less "
         "than with keys and values of every head"),
        ("optimizer's share of a step", f"{last['optimizer_share']:.1%}" if "optimizer_share" in last else "–"),
        ("skipped steps", f"{last.get('skipped', 0)}"),
    ]  # fmt: skip
    if bill.tables:
        rows.append(("memory tables", f"{bill.tables:,} parameters that cost no products"))
    if bill.mtp:
        rows.append(("MTP modules", f"{bill.mtp:,} parameters"))
    pairs = (line.partition(": ") for line in option_lines(config, bill))
    return rows + [(f"option {name}", price) for name, _, price in pairs]


def _samples(lines: Lines) -> str:
    found = next((x for x in reversed(lines) if "sample" in x), None)
    if found is None:
        return ""
    judged = "parsed" in found
    head = "<h2>Samples</h2>"
    if judged:
        head += (
            f"<p>{found['parsed']:.0%} of {found['judged']} samples at temperature {TEMPERATURE} parse as Python "
            "(an unfinished end of at most three lines left out).</p>"
        )
    marks = {True: "<i>parses</i>", False: "<i class=no>does not parse</i>"}
    shown = [
        f"<pre class=sample>{marks[parses(s)] if judged else ''}{escape(s)}</pre>"
        for s in found.get("samples", [found["sample"]])
    ]
    return f"{head}<div class=samples>{''.join(shown)}</div>"


def _machine_rows(m: Mapping[str, Any]) -> list[tuple[str, str]]:
    versions = ", ".join(f"{k} {v}" for k, v in m["versions"].items())
    return [
        ("machine", f"{m['processor']}, {m['cores']} cores, {m['memory']}, {m['system']}"),
        ("software", f"Python {m['python']}, {versions}"),
    ]


def _table(rows: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<tr><td>{escape(k)}<td>{escape(v)}" for k, v in rows)
    return f"<table>{cells}</table>"


def _details(title: str, tree: Mapping[str, Any]) -> str:
    return f"<details><summary>{escape(title)}</summary><pre>{escape(json.dumps(tree, indent=1))}</pre></details>"


def _millions(n: float) -> str:
    return f"{n / 1e6:,.1f} M" if n < 1e9 else f"{n / 1e9:,.2f} B"
