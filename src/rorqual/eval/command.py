"""`rorqual eval MODEL`: results as JSON and a table; `rorqual eval --compare a.json b.json`: a paired comparison."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from rorqual.errors import ConfigError
from rorqual.eval.config import EvalConfig

if TYPE_CHECKING:
    from rorqual.eval.compare import Difference


@dataclass(frozen=True)
class EvalOptions:
    """How good a model is, with intervals.

    rorqual eval models/smollm2 --tasks sums:style=words gym:family=gcd humaneval --out smollm2.json
    """

    model: tyro.conf.Positional[Path | None] = None
    config: tyro.conf.OmitArgPrefixes[EvalConfig] = field(default_factory=EvalConfig)
    out: Path | None = None  # where the results are written as JSON
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    compare: tuple[Path, Path] | None = None  # two result files, instead of evaluating


def evaluate(argv: Sequence[str]) -> int:
    options = tyro.cli(EvalOptions, args=list(argv), prog="rorqual eval")
    if options.compare is not None:
        from rorqual.eval import compare

        if options.model is not None:
            raise ConfigError("--compare: takes two result files and no model")
        first, second = options.compare
        _print_differences(first, second, compare.compare(compare.read(first), compare.read(second)))
        return 0
    if options.model is None:
        raise ConfigError("rorqual eval: name a model folder, or --compare a.json b.json")
    config = options.config
    if not (config.tasks or config.text or config.data):
        raise ConfigError("rorqual eval: nothing to evaluate; give --tasks, --text or --data")
    if options.out is not None:
        check_out(options.out)
    result = run(options.model, config, options.dtype)
    if options.out is not None:
        write(options.out, result)
    print_result(result)
    return 0


def run(model: Path, config: EvalConfig, dtype: str = "auto") -> dict[str, Any]:
    """All that the config asks for, as what the JSON file holds."""
    from rorqual.config import to_dict
    from rorqual.engine.llm import LLM
    from rorqual.eval import bits, families

    llm = LLM(model, dtype=dtype)
    suites = [families.suite(spec, config, llm.loaded.template is not None) for spec in config.tasks]
    texts = [bits.of_file(llm.loaded, path, config.window) for path in config.text]
    texts += [bits.of_data(llm.loaded, folder, config.window) for folder in config.data]
    return {
        "kind": "rorqual eval",
        "model": str(model),
        "date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "config": to_dict(config),
        "tasks": [families.evaluate(llm, suite, config) for suite in suites],
        "texts": texts,
    }


def check_out(path: Path) -> None:
    """That a result can be written, before there is one. Raises ConfigError."""
    if path.is_dir():
        raise ConfigError(f"--out {path}: is a folder; name a file, such as {path / 'result.json'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ConfigError(f"--out {path}: {path.parent} cannot be made ({e.strerror}); name another") from e


def write(path: Path, result: dict[str, Any]) -> None:
    """Whole or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        json.dump(result, file, indent=1, ensure_ascii=False)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def print_result(result: dict[str, Any]) -> None:
    """The table of a result."""
    from rich.console import Console
    from rich.table import Table

    table = Table("what", "score", "95%", "of", "", title=result["model"])
    for row in result["tasks"]:
        notes = [f"{k} {v:.1%}" for k, v in row["passes"].items() if k != "pass@1" and v is not None]
        notes += ["all there are"] if row["problems"] < result["config"]["problems"] else []
        notes += [f"{row['truncated']} cut at the limit"] if row["truncated"] else []
        notes += [f"grader failed {row['grader_failed']}"] if row["grader_failed"] else []
        interval = f"{row['low']:.1%} to {row['high']:.1%}"
        size = f"{row['problems']} x {row['samples']}"
        table.add_row(row["task"], f"{row['accuracy']:.1%}", interval, size, ", ".join(notes))
    for row in result["texts"]:
        interval = f"{row['low']:.4f} to {row['high']:.4f}"
        table.add_row(
            row["text"], f"{row['bits_per_byte']:.4f} bits/byte", interval, f"{row['bytes']:,} bytes", ""
        )
    Console().print(table)


def _print_differences(first: Path, second: Path, rows: Sequence[Difference]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("what", first.name, second.name, "difference, 95%", "p", "pairs", title="paired comparison")
    for row in rows:
        interval = f"{row.b - row.a:+.4f} ({row.low:+.4f} to {row.high:+.4f})"
        table.add_row(row.what, f"{row.a:.4f}", f"{row.b:.4f}", interval, f"{row.p:.4g}", str(row.pairs))
    Console().print(table)
