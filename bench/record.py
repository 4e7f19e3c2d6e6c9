"""Benchmark records: what was measured, on which machine, beside which peer. The README's tables come from
these.

Each script in this folder measures and calls `write_record`; nothing else writes bench/records.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RECORDS = Path(__file__).parent / "records"


@dataclass(frozen=True)
class Row:
    """One measurement. `ratio` is turned so that more is better: ours/peer for speeds, peer/ours for costs.

    Where there is no peer, `peer` is the bound we hold ourselves to or None, and `ratio` is ours against it.
    """

    what: str
    ours: float
    peer: float | None = None
    peer_name: str = ""
    ratio: float | None = None
    goal: float | None = None
    unit: str = ""
    note: str = ""

    @property
    def reached(self) -> bool | None:
        """Whether the goal holds; None where there is no goal or no ratio."""
        if self.goal is None or self.ratio is None:
            return None
        return self.ratio >= self.goal


def faster(
    what: str,
    ours: float,
    peer: float | None,
    peer_name: str,
    goal: float | None = None,
    unit: str = "",
    note: str = "",
) -> Row:
    """A row of a quantity of which more is better, such as tokens a second."""
    return Row(what, ours, peer, peer_name, None if not peer else ours / peer, goal, unit, note)


def smaller(
    what: str,
    ours: float,
    peer: float | None,
    peer_name: str,
    goal: float | None = None,
    unit: str = "",
    note: str = "",
) -> Row:
    """A row of a quantity of which less is better, such as bytes or seconds."""
    return Row(what, ours, peer, peer_name, None if not peer or not ours else peer / ours, goal, unit, note)


def write_record(name: str, rows: Sequence[Row], **extra: Any) -> Path:
    """Write bench/records/NAME.json whole or not at all and return its path. `extra` is kept beside the
    rows."""
    from rorqual.device import machine

    record = {
        "name": name,
        "date": time.strftime("%Y-%m-%d"),
        "commit": _commit(),
        "machine": machine(),
        **extra,
        "rows": [asdict(row) for row in rows],
    }
    RECORDS.mkdir(exist_ok=True)
    path = RECORDS / f"{name}.json"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return path


def read_record(name: str) -> dict[str, Any]:
    """A record as written."""
    record = json.loads((RECORDS / f"{name}.json").read_text(encoding="utf-8"))
    assert isinstance(record, dict)
    return record


def _commit() -> str:
    out = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=RECORDS.parent
    )
    return out.stdout.strip() or "unknown"
