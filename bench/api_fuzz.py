"""schemathesis against our own openapi.json: no 5xx, no status or content type that is not documented.

python bench/api_fuzz.py --environments DIR [--examples 500]
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro

sys.path.insert(0, str(Path(__file__).parent))
from api_matrix import free_port, running
from record import Row, write_record

CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


@dataclass(frozen=True)
class Options:
    """Where schemathesis is, and how much it tries."""

    environments: Path
    """Folder of environments; DIR/schemathesis is made where it is missing."""
    examples: int = 500
    """Generated cases for each operation at most."""


def schemathesis(folder: Path) -> str:
    """Its command, installed on first use."""
    home = folder / "schemathesis"
    if not (home / "bin" / "schemathesis").exists():
        subprocess.run([sys.executable, "-m", "venv", str(home)], check=True)
        subprocess.run(
            [str(home / "bin" / "python"), "-m", "pip", "install", "-q", "schemathesis"], check=True
        )
    return str(home / "bin" / "schemathesis")


def main() -> None:
    """Fuzz a scripted server and write bench/records/api_fuzz.json."""
    options = tyro.cli(Options)
    command = schemathesis(options.environments)
    with tempfile.TemporaryDirectory() as scratch:
        script, port = Path(scratch, "script.json"), free_port()
        script.write_text(json.dumps({"max_model_len": 2048, "answers": [{"text": "Hello!"}]}))
        serve = [sys.executable, "-m", "rorqual.cli", "serve", "--scripted", str(script), "--port", str(port)]
        url = f"http://127.0.0.1:{port}"
        with running([*serve, "--ledger", str(Path(scratch, "ledger.db"))], url, Path(scratch, "log.txt")):
            fuzz = [
                command,
                "run",
                f"{url}/openapi.json",
                "--max-examples",
                str(options.examples),
                "--checks",
                CHECKS,
            ]
            done = subprocess.run(
                [*fuzz, "--request-timeout", "20"], cwd=scratch, capture_output=True, text=True
            )
    print(done.stdout)
    found = re.search(r"(\d+) generated, (?:(\d+) passed|(\d+) found)", done.stdout)
    assert found, done.stdout + done.stderr
    cases, failed = int(found.group(1)), int(found.group(3) or 0)
    note = "no 5xx, no undocumented status, content type or shape"
    row = Row(
        f"API, fuzzed requests of {cases} borne",
        cases - failed,
        cases,
        "",
        (cases - failed) / cases,
        1.0,
        "",
        note,
    )
    print(write_record("api_fuzz", [row]))


if __name__ == "__main__":
    main()
