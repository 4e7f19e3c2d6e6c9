"""The README's tables are those of the records, and its commands exist."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from rorqual.cli import COMMANDS

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("readme", ROOT / "bench" / "readme.py")
assert spec is not None
assert spec.loader is not None
readme = importlib.util.module_from_spec(spec)
spec.loader.exec_module(readme)


def test_the_tables_are_generated() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.render(text, ROOT / "bench" / "records") == text, "run `make readme`"


def test_every_command_named_exists() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"rorqual ([a-z]+) ", text))
    assert named <= set(COMMANDS)
    assert len(named) >= 6


def test_records_have_the_fields_and_honest_ratios() -> None:
    for path in (ROOT / "bench" / "records").glob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        assert {"name", "date", "commit", "machine", "rows"} <= set(record), path
        for row in record["rows"]:
            assert {"what", "ours", "peer", "peer_name", "ratio", "goal"} <= set(row), path
            if row["ratio"] is not None and row["peer"]:
                quotients = (row["ours"] / row["peer"], row["peer"] / row["ours"] if row["ours"] else None)
                assert any(q is not None and q == pytest.approx(row["ratio"], rel=1e-6) for q in quotients), (
                    row
                )


def test_a_goal_that_is_missed_says_so() -> None:
    row = {
        "what": "w",
        "ours": 1.0,
        "peer": 2.0,
        "peer_name": "p",
        "ratio": 0.5,
        "goal": 1.5,
        "unit": "u",
        "note": "",
    }
    assert "not reached" in readme.row(row)
    assert "| reached |" in readme.row({**row, "ratio": 1.5})
