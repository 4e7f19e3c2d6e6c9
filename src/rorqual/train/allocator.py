"""Memory that a step frees is kept for the next step.

glibc hands large blocks back to the system at once, and the next step's gradients fault them in again page by page: 4%
of a dense step and 8% of one with experts on two cores.
"""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # malloc.h
_LARGE = 2**31 - 1  # mallopt takes an int


def keep_freed_memory() -> bool:
    """Ask the C library to; False where it is not glibc, which changes nothing but speed."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGE)) and bool(mallopt(_TRIM_THRESHOLD, _LARGE))
