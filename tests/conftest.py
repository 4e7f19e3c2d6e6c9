"""One thread per test process: tiny models lose more to synchronisation than they gain. Every test starts
from the same seed, so that a failure comes back."""

import os
import sys

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(autouse=True)
def same_seed() -> None:
    """Seeds torch where a test file has imported it."""
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(0)
