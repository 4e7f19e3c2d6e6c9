"""The native library: built for this processor or another, stale, missing, or not wanted."""

import logging
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual.errors import ConfigError
from rorqual.kernels import native as module
from rorqual.kernels.native import ISAS, native
from tests.native import loaded, without_a_library


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch):
    """The choice made anew, and forgotten afterwards."""
    monkeypatch.delenv("RORQUAL_ISA", raising=False)
    monkeypatch.delenv("ATEN_CPU_CAPABILITY", raising=False)
    native.cache_clear()
    yield monkeypatch
    native.cache_clear()


def built() -> bool:
    return (module.HERE / "librorqual.so").is_file()


def test_the_choice_is_said_once(fresh: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "rorqual"):
        first, second = native(), native()
    assert first is second
    assert len(caplog.records) == 1
    assert caplog.messages[0].startswith("kernels: native" if built() else "kernels: torch")


def test_off_means_torch(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("RORQUAL_ISA", "off")
    assert native() is None


def test_an_unknown_variant_is_refused(fresh: pytest.MonkeyPatch) -> None:
    fresh.setenv("RORQUAL_ISA", "sse2")
    with pytest.raises(ConfigError, match=r"RORQUAL_ISA='sse2'.*portable"):
        native()


@pytest.mark.parametrize(("capability", "isa"), [("default", "portable"), ("avx2", "avx2")])
def test_torchs_own_limit_holds_here_too(fresh: pytest.MonkeyPatch, capability: str, isa: str) -> None:
    """vllm-project/vllm#5317: a processor without AVX-512 or bfloat16 takes another path at run time."""
    fresh.setenv("ATEN_CPU_CAPABILITY", capability)
    chosen = native()
    if chosen is not None:
        assert chosen.isa in (isa, "portable")


def test_a_processor_that_can_less_takes_the_portable_path(fresh: pytest.MonkeyPatch) -> None:
    """deepseek-ai/FlashMLA#79: a fast kernel is optional; what is not there is passed over."""
    library = loaded()
    before = library.isa
    fresh.setattr(module, "_load", lambda: library)
    fresh.setattr(library, "use", lambda isa: isa == "portable")
    native.cache_clear()
    assert native() is library
    fresh.undo()
    library.use(before)


@pytest.mark.parametrize("fault", ["missing", "stale", "damaged"])
def test_what_cannot_be_used_is_said_and_passed_over(
    fault: str, fresh: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if not built() and fault == "stale":
        without_a_library()
    for path in module.HERE.glob("*.*"):
        if path.suffix in (".cpp", ".h") or (path.suffix == ".so" and fault == "stale"):
            shutil.copy(path, tmp_path)
    if fault == "stale":
        (tmp_path / "kernels.h").write_text("// changed since")
    if fault == "damaged":
        (tmp_path / "librorqual.so").write_bytes(b"not a library")
    fresh.setattr(module, "HERE", tmp_path)
    with caplog.at_level(logging.INFO, "rorqual"):
        assert native() is None
    assert len(caplog.records) == 1
    wanted = {"missing": "was not built", "stale": "older than its sources", "damaged": "librorqual.so"}[
        fault
    ]
    assert wanted in caplog.messages[0]


@pytest.mark.skipif(not Path("/proc/self/maps").is_file() or not built(), reason="needs Linux and a library")
def test_threads_are_torchs_own() -> None:
    """One OpenMP runtime in the process: a second would spin against the first."""
    code = (
        "from rorqual.kernels.native import native; native(); "
        "maps = open('/proc/self/maps').read().split(); print(len({m for m in maps if 'gomp' in m or 'iomp' in m}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1"


def test_variants_are_named_best_first() -> None:
    assert ISAS[0] == "avx512"
    assert ISAS[-1] == "portable"
