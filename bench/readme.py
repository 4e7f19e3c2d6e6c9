"""Write the README's measured tables from bench/records: `make readme`. A test fails where they differ.

The README marks each table's place with `<!-- records: NAME NAME … -->` and `<!-- /records -->`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"(<!-- records: ([^>]*?) -->\n).*?(<!-- /records -->)", re.DOTALL)


def render(text: str, records: Path) -> str:
    """The README's text with each marked block replaced by its table."""
    return BLOCK.sub(lambda m: m[1] + table(m[2].split(), records) + m[3], text)


def table(names: list[str], records: Path) -> str:
    """One table of the rows of the named records; a trailing * in a name takes every record that begins
    so."""
    found = [path for name in names for path in sorted(records.glob(f"{name}.json"))]
    lines = ["| what | ours | peer | ratio | goal | |", "|---|---|---|---|---|---|"]
    machines = []
    for path in found:
        record = json.loads(path.read_text(encoding="utf-8"))
        lines += [row(r) for r in record["rows"]]
        m = record["machine"]
        machines.append(
            f"{record['name']}: {m['processor']}, {m['cores']} cores, {record['date']}, {record['commit']}"
        )
    if not found:
        return "Not measured yet on a quiet machine.\n"
    return "\n".join(lines) + "\n\n<sub>" + "; ".join(machines) + "</sub>\n"


def row(r: dict[str, Any]) -> str:
    """One line of a table; a goal that is not reached says so."""
    peer = f"{r['peer_name']} {figure(r['peer'])}".strip() if r["peer"] is not None else r["peer_name"] or "–"
    ratio = "–" if r["ratio"] is None else f"{r['ratio']:.2f}x"
    goal = "–" if r["goal"] is None else f"{r['goal']:.3g}x"
    verdict = (
        ""
        if r["goal"] is None or r["ratio"] is None
        else "reached"
        if r["ratio"] >= r["goal"]
        else "not reached"
    )
    note = f" ({r['note']})" if r.get("note") else ""
    ours = f"{figure(r['ours'])} {r.get('unit', '')}".strip()
    return f"| {r['what']}{note} | {ours} | {peer} | {ratio} | {goal} | {verdict} |"


def figure(value: float | None) -> str:
    """Three significant digits, thousands grouped."""
    if value is None:
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def main() -> int:
    """Rewrite README.md; with --check only compare, exit 1 where it differs."""
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = render(old, ROOT / "bench" / "records")
    if "--check" in sys.argv[1:]:
        return int(old != new)
    path.write_text(new, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
