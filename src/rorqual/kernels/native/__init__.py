"""The native library: which instruction set it runs with, and its functions on torch tensors.

Built when the package is installed (setup.py). `library()` is None where it is not there or not wanted; the reason is
said once. `RORQUAL_ISA` (avx512, avx2, portable, off) overrides the choice, for tests.

OpenMP: the library leaves OpenMP's symbols open and takes those of the runtime that torch has loaded, so both share one
pool; threads of a second runtime would spin while the first one works.
"""

from __future__ import annotations

import ctypes
import functools
import glob
import logging
import os
import platform
from pathlib import Path

import torch

log = logging.getLogger("rorqual")

FLAGS = {
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni", "avx512_bf16"},
    "avx2": {"avx2", "fma", "f16c"},
    "portable": set(),
}


class Library:
    """Functions of one instruction set, by name without prefix and suffix."""

    def __init__(self, handle: ctypes.CDLL, isa: str) -> None:
        self._handle, self.isa = handle, isa

    def call(self, name: str, *arguments: object) -> None:
        """Call a function; tensors go as pointers, whole numbers as int64, fractions as float."""
        function = getattr(self._handle, f"rq_{name}_{self.isa}")
        function.restype = None
        function(*(_argument(a) for a in arguments))


def _argument(value: object) -> object:
    if isinstance(value, torch.Tensor):
        assert value.is_contiguous()
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, float):
        return ctypes.c_float(value)
    assert isinstance(value, int)
    return ctypes.c_int64(value)


@functools.cache
def library() -> Library | None:
    """The library for this processor, or None with the reason logged once."""
    wanted = os.environ.get("RORQUAL_ISA", "")
    if wanted == "off":
        return None
    path = Path(__file__).with_name("librorqual.so")
    if not path.is_file():
        log.info("kernels: torch (the native library was not built; install again with a C++ compiler)")
        return None
    try:
        _load_openmp()
        handle = ctypes.CDLL(str(path))
    except OSError as e:
        log.info("kernels: torch (%s)", e)
        return None
    isa = wanted or next(name for name, flags in FLAGS.items() if flags <= _processor_flags())
    log.info("kernels: native, %s", isa)
    return Library(handle, isa)


def _load_openmp() -> None:
    """Make the symbols of torch's OpenMP runtime visible to our library."""
    found = sorted(glob.glob(str(Path(torch.__file__).parent / "lib" / "libgomp*.so*")))
    ctypes.CDLL(found[0] if found else "libgomp.so.1", mode=ctypes.RTLD_GLOBAL)


def _processor_flags() -> set[str]:
    if platform.machine() not in ("x86_64", "AMD64"):
        return set()
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return set()
    line = next((x for x in text.splitlines() if x.startswith("flags")), "")
    return set(line.split())
