"""Every native kernel is tested in each variant that this processor runs."""

from collections.abc import Iterator

import pytest

from rorqual.kernels.native import ISAS, Native
from tests.native import running


@pytest.fixture(params=ISAS)
def library(request: pytest.FixtureRequest) -> Iterator[Native]:
    """The native library running one variant."""
    yield from running(request.param)
