"""`rorqual train`: a preset from one dial, a file, dotted overrides."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from rorqual.config import load_config


@dataclass(frozen=True)
class TrainOptions:
    """Pretrain a model. Overrides are dotted: `rorqual train --data d shape.depth=6 optim.lr=0.01`."""

    overrides: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    config: Path | None = None  # a TOML or JSON file of the same keys
    data: tuple[Path, ...] = ()  # folders of `rorqual data build`
    out: Path | None = None  # the run folder
    depth: int | None = None  # the one dial: layers, and 64 of width each
    family: str | None = None  # deepseek or llama
    steps: int | None = None
    init_from: Path | None = None  # a model folder to go on from
    extend_context: int | None = None  # with init_from: stretch its positions by YaRN
    resume: bool = False  # go on from the last checkpoint

    def all_overrides(self) -> list[str]:
        """Flags as overrides, before those written out."""
        flags = {
            "out": self.out,
            "shape.depth": self.depth,
            "shape.family": self.family,
            "steps": self.steps,
            "init_from": self.init_from,
            "extend_context": self.extend_context,
        }
        found = [f"{key}={value}" for key, value in flags.items() if value is not None]
        if self.data:
            listed = ", ".join(f'"{d}"' for d in self.data)
            found.append(f"data=[{listed}]")
        return [*found, *self.overrides]


def train(argv: Sequence[str]) -> int:
    options = tyro.cli(TrainOptions, args=list(argv), prog="rorqual train")
    from rorqual.train.config import TrainConfig

    config = load_config(TrainConfig, options.config, options.all_overrides())
    from rorqual.train.run import train as run
    from rorqual.train.trainer import exit_code

    result = run(config, options.resume)
    where = config.out / "checkpoints" / f"step-{result.step:08d}"
    if result.stopped is not None:
        print(f"stopped at step {result.step}; go on with --resume")
    else:
        print(f"report: {config.out / 'report.html'}\ntalk with it: rorqual generate {where} 'def '")
    return exit_code(result)
