"""What this machine has: memory, cores, and the measured limits against which speed is judged."""

from __future__ import annotations

import os
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rorqual.errors import CapacityError, ConfigError

if TYPE_CHECKING:
    import torch

DTYPES = ("float32", "bfloat16", "float16")


def resolve_dtype(name: str) -> torch.dtype:
    """The torch dtype of a name; raises ConfigError for another."""
    import torch

    if name not in DTYPES:
        raise ConfigError(f"dtype={name!r}: must be one of {', '.join(DTYPES)}")
    dtype = getattr(torch, name)
    assert isinstance(dtype, torch.dtype)
    return dtype


def resolve_device(name: str = "auto") -> torch.device:
    """ "auto" is CUDA where there is one, else the CPU."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as e:
        raise ConfigError(f"device={name!r}: must be auto, cpu or cuda[:N]") from e
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={name!r}: this machine has no CUDA device; use device=cpu")
    return device


def available_memory() -> int:
    """Bytes that this process may still take: free memory, or what its control group leaves, whichever is
    less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    limits = [free]
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        try:
            limits.append(int(Path(limit).read_text()) - int(Path(used).read_text()))
        except (OSError, ValueError):
            continue  # no such control group here, or no limit set ("max")
    return max(0, min(limits))


def require_memory(needed: int, what: str, cure: str) -> None:
    """Refuse before work begins what this machine cannot hold."""
    there = available_memory()
    if needed > there:
        raise CapacityError(
            f"{what}: needs {format_bytes(needed)} of memory, {format_bytes(there)} is available; {cure}"
        )


def format_bytes(n: float) -> str:
    """3.2 GB, with decimal prefixes."""
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if abs(n) >= size:
            return f"{n / size:.1f} {unit}"
    return f"{n:.0f} B"


@dataclass(frozen=True)
class Limits:
    """Measured here and now: read bandwidth in bytes/s and matrix-product peaks in FLOP/s, all threads
    together."""

    bandwidth: float
    flops_float32: float
    flops_bfloat16: float


def measure_limits(seconds: float = 0.3) -> Limits:
    """A short measurement of the machine's limits; each is the best of several tries."""
    import torch

    data = torch.ones(64 * 1024 * 1024, dtype=torch.float32)  # 256 MB: far beyond the last-level cache
    bandwidth = data.numel() * 4 / _best(lambda: data.sum(), seconds)
    peaks = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(1024, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
        peaks[dtype] = 2 * 1024 * 2048 * 2048 / _best(lambda a=a, b=b: a @ b, seconds)
    return Limits(bandwidth, peaks[torch.float32], peaks[torch.bfloat16])


def _best(work: Any, seconds: float) -> float:
    work()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        work()
        best = min(best, time.perf_counter() - start)
    return best


def machine() -> dict[str, Any]:
    """The machine for a record: processor, cores, memory and the versions that matter."""
    import importlib.metadata as metadata

    import psutil

    versions = {}
    for package in ("torch", "transformers", "numpy"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": format_bytes(psutil.virtual_memory().total),
        "system": platform.system(),
        "python": platform.python_version(),
        "versions": versions,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def describe(limits: Limits) -> dict[str, float]:
    """Limits as plain values for a record."""
    return asdict(limits)
