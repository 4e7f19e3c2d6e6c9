"""`rorqual train`: a preset from one dial, a file, dotted overrides; `rorqual sft`: conversations."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from rorqual.config import load_config
from rorqual.errors import ConfigError, RunError

if TYPE_CHECKING:
    from rorqual.train.config import TrainConfig
    from rorqual.train.sft import SftConfig

OVERRIDE = re.compile(r"[a-z_]+(\.[a-z_0-9]+)*=")  # a dotted key


@dataclass(frozen=True)
class TrainOptions:
    """Pretrain a model. Overrides are dotted: `rorqual train --data d shape.depth=6 optim.lr=0.01`."""

    overrides: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE")] = ()
    config: Path | None = None  # a TOML or JSON file of the same keys
    data: tyro.conf.UseAppendAction[
        tuple[Path, ...]
    ] = ()  # a folder of `rorqual data build`; may be repeated
    out: Path | None = None  # the run folder
    depth: int | None = None  # the one dial: layers, and 64 of width each
    family: str | None = None  # deepseek or llama
    steps: int | None = None
    init_from: Path | None = None  # a model folder to go on from
    extend_context: int | None = None  # with init_from: stretch its positions by YaRN
    resume: bool = False  # go on from the last checkpoint, with the run's own config
    nproc: int = 1  # processes that share the run; parallel.* says how
    launcher: Literal["local", "ray"] = (
        "local"  # where they run: this machine, or a Ray cluster (RAY_ADDRESS)
    )
    show: bool = False  # print the config and what it costs, and leave

    def all_overrides(self) -> list[str]:
        """Flags as overrides, before those written out."""
        flags = {
            "data": [str(d) for d in self.data] or None,
            "out": None if self.out is None else str(self.out),
            "shape.depth": self.depth,
            "shape.family": self.family,
            "steps": self.steps,
            "init_from": None if self.init_from is None else str(self.init_from),
            "extend_context": self.extend_context,
        }
        return [f"{k}={json.dumps(v)}" for k, v in flags.items() if v is not None] + list(self.overrides)


@dataclass(frozen=True)
class SftOptions:
    """Fine-tune a model on conversations, with loss on the assistant's words only."""

    model: tyro.conf.Positional[Path]
    data: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="JSONL")]
    out: Path = Path("runs/sft")
    epochs: int = 3
    lr: float | None = None  # 1e-4, or 1e-3 with --lora-rank
    lora_rank: int | None = None  # train adapters of this rank instead of all weights
    lora_alpha: float | None = None  # 2 * rank
    lora_targets: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # q_proj, …: all projections by default
    batch_size: int = 4
    accumulate: int = 2
    seq_len: int = 512
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    heldout: float = 0.05
    eval_every: int = 50
    save_every: int = 200
    recompute: bool = False
    seed: int = 0
    resume: bool = False

    def config(self) -> SftConfig:
        """The run that these options mean."""
        from rorqual.checkpoint.lora import TARGETS, Lora
        from rorqual.train.sft import SftConfig

        lora = None
        if self.lora_rank is not None:
            alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
            lora = Lora(self.lora_rank, alpha, self.lora_targets or TARGETS)
        elif self.lora_alpha is not None or self.lora_targets:
            raise ConfigError("--lora-alpha, --lora-targets: need --lora-rank")
        own = {k: v for k, v in self.__dict__.items() if not k.startswith("lora_") and k != "resume"}
        return SftConfig(**own, lora=lora)


def sft(argv: Sequence[str]) -> int:
    options = tyro.cli(SftOptions, args=list(argv), prog="rorqual sft")
    config = options.config()
    from rorqual.train.sft import sft as run
    from rorqual.train.stop import exit_code
    from rorqual.train.view import echo

    result = run(config, options.resume)
    echo(f"report: {config.out / 'report.html'}\ntalk with it: rorqual chat {result.folder}")
    if config.lora is not None:
        echo(f"the adapter alone: {config.out / 'adapter'}")
    return exit_code(result.stopped)


def train(argv: Sequence[str]) -> int:
    options = parse_train(argv)
    if options.nproc < 1:
        raise ConfigError(f"--nproc {options.nproc}: must be 1 or more")
    config = train_config(options)
    if options.show:
        return _show(config)
    from rorqual.parallel.environment import restarted, world_of
    from rorqual.train import folders
    from rorqual.train.launch import launch

    rank, world = world_of()
    if options.launcher == "ray" and world == 1:
        from rorqual.train.ray_workers import launch as launch_on_ray

        step = launch_on_ray(config, options.nproc, options.resume)
        print(ending(config.out, folders.folder_of(config.out, step), step, config.steps))
        return 0
    if options.nproc > 1 and world == 1:
        return launch(options.nproc, argv, config.out)
    from rorqual.parallel.mesh import leave, lost_the_others
    from rorqual.train.run import train as run
    from rorqual.train.stop import exit_code
    from rorqual.train.view import echo

    resume = options.resume or (restarted() and bool(folders.steps(config.out)))
    try:
        result = run(config, resume)
    except RuntimeError as e:
        if world == 1 or not lost_the_others(e):
            raise
        print(f"error: process {rank} lost the others: {str(e).splitlines()[0]}", file=sys.stderr)
        return 1  # the launcher knows which one died, and starts all again
    leave()
    if rank == 0:
        echo(ending(config.out, result.folder, result.step, config.steps))
    return exit_code(result.stopped)


def parse_train(argv: Sequence[str]) -> TrainOptions:
    """Options of a command line; overrides may stand anywhere among the flags."""
    overrides = [a for a in argv if OVERRIDE.match(a)]
    rest = [a for a in argv if not OVERRIDE.match(a)]
    return tyro.cli(TrainOptions, args=[*rest, *overrides], prog="rorqual train")


def train_config(options: TrainOptions) -> TrainConfig:
    """The config of a run: a file or, when it is resumed, the run's own, with overrides on top."""
    from rorqual.train.config import TrainConfig

    overrides = options.all_overrides()
    if not options.resume:
        return load_config(TrainConfig, options.config, overrides)
    out = load_config(TrainConfig, options.config, [o for o in overrides if o.startswith("out=")]).out
    own = out / "run.json"
    if options.config is None:
        overrides = ["stop_at=null", *overrides]  # there it has stopped: the run's own is over
    if not own.is_file():
        raise RunError(
            f"--resume: nothing to resume in {out.resolve()} (no run.json); name the run's folder with --out"
        )
    return load_config(TrainConfig, options.config or own, overrides)


def _show(config: TrainConfig) -> int:
    from rorqual.config import to_dict
    from rorqual.model.cost import cost
    from rorqual.text.tokenizer import Tokenizer
    from rorqual.train.bill import bill_lines
    from rorqual.train.run import model_config

    if config.data or config.init_from is not None:
        shape = model_config(
            config, Tokenizer.load(config.data[0] if config.data else config.init_from or Path())
        )
    else:
        shape = config.shape.model(config.shape.vocab_size or 4096, config.seq_len)
    print(json.dumps(to_dict(config), indent=1))
    print("\n".join(bill_lines(config, cost(shape))))
    return 0


def ending(out: Path, folder: Path, step: int, steps: int) -> str:
    """What to do next."""
    report = f"report: {out / 'report.html'}"
    if step < steps:
        return f"stopped at step {step:,} of {steps:,}, saved in {folder}; go on with --resume --out {out}\n{report}"
    return f"{report}\nwrite with it: rorqual generate {folder} 'def '\nserve it: rorqual serve {folder}"
