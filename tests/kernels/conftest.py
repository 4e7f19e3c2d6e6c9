"""Every native kernel is tested in each variant that this processor runs."""

import os
import shutil
from collections.abc import Iterator
from typing import NoReturn

import pytest

from rorqual.kernels.native import ISAS, Native, native


def without_a_library() -> NoReturn:
    """Skip where there can be none; where there is a compiler, its absence is a fault of the build."""
    if os.environ.get("RORQUAL_ISA") != "off" and shutil.which(os.environ.get("CXX", "g++").split()[0]):
        pytest.fail("no native library, though there is a compiler: python setup.py build_ext --inplace")
    pytest.skip("no native library: no C++ compiler, or RORQUAL_ISA=off")


@pytest.fixture(params=ISAS)
def library(request: pytest.FixtureRequest) -> Iterator[Native]:
    """The native library running one variant; the test is skipped where there is none."""
    loaded = native()
    if loaded is None:
        without_a_library()
    before = loaded.isa
    if not loaded.use(request.param):
        pytest.skip(f"this processor does not run {request.param}")
    yield loaded
    loaded.use(before)
