"""report.html of a built set: what each stage removed and why, with examples; sizes and token counts. One file."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --mark: #0b7285; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } td, th { padding: .3rem .6rem; border-bottom: 1px solid var(--line);
text-align: left; } td.n { text-align: right; font-variant-numeric: tabular-nums; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .7rem; }
.tile { background: var(--soft); border-radius: .5rem; padding: .7rem .9rem; } .tile b { display: block;
font-size: 1.3rem; } .bar { background: var(--mark); height: .7rem; border-radius: .2rem; }
pre { background: var(--soft); padding: .6rem; border-radius: .4rem; white-space: pre-wrap; max-height: 9rem;
overflow: auto; font-size: 12px; } summary { cursor: pointer; }
"""


def write_report(path: Path, meta: dict[str, Any]) -> None:
    """Write the page from a build's meta."""
    path.write_text(page(meta), encoding="utf-8")


def page(meta: dict[str, Any]) -> str:
    """The page as HTML. Everything that came from the text is escaped."""
    tally = meta["tally"]
    train, heldout = (_sum(meta["splits"][s]) for s in ("train", "heldout"))
    tiles = {
        "documents read": f"{tally['documents']:,}",
        "documents kept": f"{tally['kept']:,} ({tally['kept'] / max(tally['documents'], 1):.0%})",
        "text read": f"{tally['raw_bytes'] / 1e6:,.1f} MB",
        "text kept": f"{tally['kept_bytes'] / 1e6:,.1f} MB",
        "training tokens": f"{train['tokens']:,}",
        "held-out tokens": f"{heldout['tokens']:,}",
        "bytes per token": f"{(train['bytes'] + heldout['bytes']) / max(train['tokens'] + heldout['tokens'], 1):.2f}",
        "vocabulary": f"{meta['vocab_size']:,}",
    }
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>",
        f"<title>Data report</title><style>{_STYLE}</style><h1>Data report</h1><div class=tiles>",
        *(f"<div class=tile>{escape(k)}<b>{escape(v)}</b></div>" for k, v in tiles.items()),
        "</div><h2>What was removed, and why</h2>",
        _removed(tally),
        f"<p>Boilerplate lines cut out of kept documents: {tally['boilerplate_lines']:,}</p>",
        "<h2>What was not read</h2>",
        _table(
            [(r, n, ", ".join(meta["skipped"]["examples"][r])) for r, n in meta["skipped"]["counts"].items()]
        ),
        "<h2>Time</h2>",
        _table([(k, f"{v:.1f} s", "") for k, v in tally["seconds"].items()]),
        "<h2>Examples of what was removed</h2>",
        *(_example(reason, shown) for reason, shown in tally["examples"].items()),
    ]
    return "\n".join(parts)


def _removed(tally: dict[str, Any]) -> str:
    rows = [(s, r, n) for s, reasons in tally["removed"].items() for r, n in reasons.items()]
    most = max((n for *_, n in rows), default=1)
    cells = [
        f"<tr><td>{escape(s)}<td>{escape(r)}<td class=n>{n:,}<td style='width:30%'>"
        f"<div class=bar style='width:{100 * n / most:.1f}%'></div></tr>"
        for s, r, n in rows
    ]
    return (
        "<table><tr><th>stage<th>rule<th>documents<th></tr>" + "".join(cells) + "</table>"
        if rows
        else "<p>Nothing.</p>"
    )


def _table(rows: list[tuple[Any, Any, str]]) -> str:
    cells = [f"<tr><td>{escape(str(a))}<td class=n>{escape(str(b))}<td>{escape(c)}</tr>" for a, b, c in rows]
    return "<table>" + "".join(cells) + "</table>" if rows else "<p>Nothing.</p>"


def _example(reason: str, shown: list[dict[str, str]]) -> str:
    body = "".join(f"<p><code>{escape(e['origin'])}</code></p><pre>{escape(e['text'])}</pre>" for e in shown)
    return f"<details><summary>{escape(reason)}</summary>{body}</details>"


def _sum(shards: list[dict[str, Any]]) -> dict[str, int]:
    return {k: sum(s[k] for s in shards) for k in ("documents", "tokens", "bytes")}
