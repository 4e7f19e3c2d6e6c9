"""`rorqual plan`: what training a model on many devices would take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import tyro


@dataclass(frozen=True)
class PlanOptions:
    """Estimate time, memory, traffic and price of a training run. The model that this rests on is within a fifth of
    DeepSeek's published GPU hours (ARCHITECTURE.md)."""

    gpus: int
    model: str  # a published name (`rorqual cost` lists them), a folder, a config.json or a GGUF file
    tokens: float  # such as 14.8e12
    device: str = "h800"
    price: float = 2.0  # of a device hour; 2 USD is what the V3 paper assumes
    length: int = 4096
    batch: float = 37.7e6  # tokens a step: pipeline stages wait less the more there are
    fp8: bool = False
    recompute: bool = (
        True  # activations of a layer again in the backward pass: memory; of time only what is cheap
    )
    pipeline: int | None = None  # stages; chosen so that it fits where this and `expert` are left out
    expert: int | None = None  # devices that share the experts


def plan(argv: Sequence[str]) -> int:
    options = tyro.cli(PlanOptions, args=list(argv), prog="rorqual plan")
    from math import isfinite

    from rorqual.checkpoint.bill import read_any_config
    from rorqual.device import format_bytes
    from rorqual.errors import ConfigError
    from rorqual.plan.device import device
    from rorqual.plan.estimate import Layout, estimate, fit

    for name in ("tokens", "batch", "length", "price"):
        value = getattr(options, name)
        if not isfinite(value) or value < 0 or (value == 0 and name != "price"):
            raise ConfigError(f"{name}={value:g}: must be above 0{' or 0' if name == 'price' else ''}")
    config = read_any_config(options.model)
    kind = device(options.device)
    more = {
        "length": options.length,
        "fp8": options.fp8,
        "recompute": options.recompute,
        "batch": options.batch,
    }
    if options.pipeline is None and options.expert is None:
        found = fit(config, options.gpus, options.tokens, kind, **more)
    else:
        layout = Layout(options.gpus, options.pipeline or 1, options.expert or 1)
        found = estimate(config, layout, options.tokens, kind, **more)  # type: ignore[arg-type]
    o = found.layout
    print(f"{options.model} on {o.gpus:,} {kind.name}: {o.pipeline} pipeline stages, experts over {o.expert} devices, "
          f"{o.gpus // (o.pipeline * o.expert):,} copies of each expert")  # fmt: skip
    print(f"  time       {found.days:,.1f} days, {found.gpu_hours:,.0f} device hours, {found.utilisation:.0%} of the "
          f"bfloat16 peak, {found.flops / 1e9:,.1f} GFLOP a token, {found.bubble:.0%} waiting")  # fmt: skip
    parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in found.memory.items())
    print(f"  memory     {format_bytes(found.bytes)} of {format_bytes(kind.memory)} a device: {parts}")
    hidden = (
        "hidden behind compute" if found.sending <= found.compute else "longer than compute: it sets the time"
    )
    print(f"  all-to-all {format_bytes(found.traffic)} a token, {found.sending / found.compute:.0%} of the compute time, "
          f"{hidden}")  # fmt: skip
    print(f"  price      {found.gpu_hours * options.price:,.0f} at {options.price:g} a device hour")
    if found.bytes > kind.memory:
        print(
            f"  does not fit: {format_bytes(found.bytes)} of {format_bytes(kind.memory)}; more stages or more devices"
        )
        return 1
    return 0
