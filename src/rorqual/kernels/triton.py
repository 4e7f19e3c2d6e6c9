"""Whether Triton can be used; its kernels are imported only then."""

from __future__ import annotations

import functools
import importlib.util


@functools.cache
def has_triton() -> bool:
    """True where the `gpu` extra is installed."""
    return importlib.util.find_spec("triton") is not None
