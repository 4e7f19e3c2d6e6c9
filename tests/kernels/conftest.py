"""Every native kernel is tested in each variant that this processor runs."""

from collections.abc import Iterator

import pytest

from rorqual.kernels.native import ISAS, Native, native


@pytest.fixture(params=ISAS)
def library(request: pytest.FixtureRequest) -> Iterator[Native]:
    """The native library running one variant; the test is skipped where there is none."""
    loaded = native()
    if loaded is None:
        pytest.skip("no native library: no C++ compiler when the package was installed, or RORQUAL_ISA=off")
    before = loaded.isa
    if not loaded.use(request.param):
        pytest.skip(f"this processor does not run {request.param}")
    yield loaded
    loaded.use(before)
