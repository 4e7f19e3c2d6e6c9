"""The native library for tests: each variant that this processor runs. Where it could be built, its absence fails."""

import os
import shutil
from collections.abc import Iterator
from typing import NoReturn

import pytest

from rorqual.kernels.native import Native, native


def without_a_library() -> NoReturn:
    """Skip where there can be none; where there is a compiler, its absence is a fault of the build."""
    if os.environ.get("RORQUAL_ISA") != "off" and shutil.which(os.environ.get("CXX", "g++").split()[0]):
        pytest.fail("no native library, though there is a compiler: python setup.py build_ext --inplace")
    pytest.skip("no native library: no C++ compiler, or RORQUAL_ISA=off")


def loaded() -> Native:
    """The library, or the end of the test."""
    found = native()
    return without_a_library() if found is None else found


def running(isa: str) -> Iterator[Native]:
    """The library running one variant, for a fixture; the test is skipped where this processor cannot."""
    library = loaded()
    before = library.isa
    if not library.use(isa):
        pytest.skip(f"this processor does not run {isa}")
    yield library
    library.use(before)
