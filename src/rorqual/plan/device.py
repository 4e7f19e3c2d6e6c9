"""Accelerators: what they multiply, hold and send. Peak figures of the makers; links as DeepSeek-V3 measured its own."""

from __future__ import annotations

from dataclasses import dataclass

from rorqual.errors import ConfigError


@dataclass(frozen=True)
class Device:
    """One device of a cluster of nodes."""

    name: str
    bf16: float  # FLOP/s, dense
    fp8: float | None  # FLOP/s, dense; None: it has no such products
    memory: float  # bytes
    inside: float  # bytes/s of one device to others of its node
    between: float  # bytes/s of one device to other nodes
    per_node: int


DEVICES = {
    d.name: d
    for d in (
        Device("h800", 989e12, 1979e12, 80e9, 160e9, 50e9, 8),  # arXiv 2412.19437, section 3.2.2
        Device("h100", 989e12, 1979e12, 80e9, 360e9, 50e9, 8),
        Device("h200", 989e12, 1979e12, 141e9, 360e9, 50e9, 8),
        Device("a100", 312e12, None, 80e9, 240e9, 25e9, 8),
    )
}


def device(name: str) -> Device:
    """By name; raises ConfigError for one that is not in the table."""
    if name not in DEVICES:
        raise ConfigError(f"--device {name}: must be one of {', '.join(DEVICES)}")
    return DEVICES[name]
