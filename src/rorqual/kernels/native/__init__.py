"""The native library: built when the package is installed (setup.py), found and described here.

Its kernels take plain pointers and share torch's threads: the library asks for `libgomp.so.1`, and as torch has
loaded its own copy under that very name, the loader gives both the same one. A second runtime's threads would
spin while the first one's work.

`RORQUAL_ISA` (avx512, avx2, portable, or off for torch alone) overrides what the processor offers;
torch's own `ATEN_CPU_CAPABILITY` limits it too.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from rorqual.errors import ConfigError

log = logging.getLogger("rorqual")

ISAS = ("avx512", "avx2", "portable")  # best first
READ = (torch.float32, torch.bfloat16)
HERE = Path(__file__).parent
TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.uint8: 2}  # kernels.h: Type

_I, _P, _F = ctypes.c_int64, ctypes.c_void_p, ctypes.c_float
_SIGNATURES = {
    "linear": [_P, _I, _I, _I, _I, _P, _I, _I, _I, _I, _P, _I],
    "experts": [_P, _P, _I, _I, _I, _I, _P, _I, _P, _P, _I, _I, _I, _P, _I],
    "rows": [_P, _I, _I, _I, _I, _P, _I, _P],
    "mla": [_P, _P, _P, _I, _I, _F, _P, _I, _I, _I, _P, _I, _I, _I, _P, _I],
    "gqa": [_P, _P, _P, _I, _I, _F, _P, _P, _I, _I, _I, _P, _I, _I, _I, _P, _I],
    "rms_norm": [_P, _I, _P, _I, _I, _F, _P, _I],
    "rope": [_P, _I, _I, _I, _P, _P, _I, _I, _I, _I, _I, _P, _I],
    "survey": [_P, _I, _I, _P, _P],
    "gated": [_P, _P, _I, _I, _I, _I, _P, _I],
    "gated_back": [_P, _P, _I, _I, _P, _P, _I, _I, _P, _P, _I, _P, _P, _I],
    "softmax": [_P, _I, _P, _I, _I, _P, _P, _I],
    "causal": [_P, _P, _P, _I],
    "causal_back": [_P, _P, _P, _P, _P, _P, _P, _I],
    "layers": [_P, _I, _P, _I, _P, _I],
}
_SIZES = ("layer_bytes", "step_bytes", "causal_bytes")


class Native:
    """The loaded library; each kernel is a method that takes addresses and numbers (dispatch.cpp)."""

    def __init__(self, handle: ctypes.CDLL) -> None:
        self._handle = handle
        self.isa = ""
        for name, signature in _SIGNATURES.items():
            function = getattr(handle, f"rorqual_{name}")
            function.argtypes, function.restype = signature, None
            setattr(self, name, function)
        for name in _SIZES:
            function = getattr(handle, f"rorqual_{name}")
            function.argtypes, function.restype = [], _I
            setattr(self, name, function)

    linear: ctypes._NamedFuncPointer
    experts: ctypes._NamedFuncPointer
    rows: ctypes._NamedFuncPointer
    mla: ctypes._NamedFuncPointer
    gqa: ctypes._NamedFuncPointer
    rms_norm: ctypes._NamedFuncPointer
    rope: ctypes._NamedFuncPointer
    survey: ctypes._NamedFuncPointer
    gated: ctypes._NamedFuncPointer
    gated_back: ctypes._NamedFuncPointer
    softmax: ctypes._NamedFuncPointer
    causal: ctypes._NamedFuncPointer
    causal_back: ctypes._NamedFuncPointer
    layers: ctypes._NamedFuncPointer
    layer_bytes: ctypes._NamedFuncPointer
    step_bytes: ctypes._NamedFuncPointer
    causal_bytes: ctypes._NamedFuncPointer

    def use(self, isa: str) -> bool:
        """Run another variant from now on; False where this processor cannot."""
        if not self._handle.rorqual_use(isa.encode()):
            return False
        self.isa = isa
        return True


@functools.cache
def native() -> Native | None:
    """The library, or None where torch computes instead. The choice is logged once."""
    wanted = _wanted()
    if wanted is None:
        log.info("kernels: torch (RORQUAL_ISA=off)")
        return None
    found = _load()
    if isinstance(found, str):
        log.warning("kernels: torch, several times slower at decoding (%s)", found)
        return None
    for isa in wanted:
        if found.use(isa):
            log.info("kernels: native, %s", isa)
            return found
    raise ConfigError(f"RORQUAL_ISA={wanted[0]}: this processor cannot; leave it out, or take portable")


def _wanted() -> tuple[str, ...] | None:
    """The variants to try in order; None for none."""
    asked = os.environ.get("RORQUAL_ISA")
    if asked == "off":
        return None
    if asked:
        if asked not in ISAS:
            raise ConfigError(f"RORQUAL_ISA={asked!r}: must be one of {', '.join(ISAS)}, or off")
        return (asked,)
    torchs = {"default": ISAS[2:], "avx2": ISAS[1:]}
    return torchs.get(os.environ.get("ATEN_CPU_CAPABILITY", ""), ISAS)


def _load() -> Native | str:
    """The library, or why there is none."""
    path = HERE / "librorqual.so"
    if not path.is_file():
        return "the native library was not built; install again with a C++ compiler"
    try:
        handle = ctypes.CDLL(str(path))
        handle.rorqual_source_hash.restype = ctypes.c_char_p
        built_from = handle.rorqual_source_hash().decode()
    except (OSError, AttributeError) as e:
        return str(e)
    if built_from != _source_hash():
        return "the native library is older than its sources; install again"
    return Native(handle)


def _source_hash() -> str:
    """As setup.py computes it."""
    digest = hashlib.sha256()
    for path in sorted(HERE.glob("*")):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def type_of(x: Tensor) -> int:
    """How the library calls the tensor's dtype. Only contiguous tensors on the CPU have an address it can use."""
    assert x.is_contiguous()
    return TYPES[x.dtype]


def can_take(*tensors: Tensor) -> bool:
    """Whether activations are of a type and place that the kernels read."""
    return all(x.dtype in READ and x.is_cpu for x in tensors)
