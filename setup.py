"""Builds the native kernels when the package is installed; everything else is in pyproject.toml.

They need a C++ compiler that takes gcc's options, and no torch: a plain C interface, so one wheel serves every
Python 3. Without a compiler, or where it fails, the package installs all the same and computes with torch.
"""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCE = Path("src/rorqual/kernels/native/kernels.cpp")
LIBRARY = SOURCE.with_name("librorqual.so")
COMPILER = "g++"
COMMON = ["-O3", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-fopenmp", "-fno-math-errno"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16", *AVX2]
# One object for each instruction set; the loader picks by what the processor has.
SETS = {"_portable": [], "_avx2": AVX2, "_avx512": AVX512}


class BuildNative(build_ext):
    """Compiles with the plain compiler into a library that ctypes loads."""

    built: Path | None = None

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).with_name(LIBRARY.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            compile_library(target)
            self.built = target
        except (OSError, subprocess.CalledProcessError) as e:
            why = getattr(e, "stderr", None) or str(e)
            print(f"native kernels were not built, torch computes instead: {why.strip()[:500]}", file=sys.stderr)

    def copy_extensions_to_source(self) -> None:
        """In an editable install the library lies beside its Python file; a failed build leaves none there."""
        LIBRARY.unlink(missing_ok=True)
        if self.built is not None:
            shutil.copy2(self.built, LIBRARY)

    def get_outputs(self) -> list[str]:
        return [] if self.built is None else [str(self.built)]

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """py3-none-PLATFORM with the library in it, py3-none-any without."""

    def get_tag(self) -> tuple[str, str, str]:
        built = bool(self.get_finalized_command("build_ext").get_outputs())
        return "py3", "none", super().get_tag()[2] if built else "any"


def compile_library(target: Path) -> None:
    """One object for each instruction set, joined. OpenMP's symbols stay open: the loader takes torch's own pool."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    with tempfile.TemporaryDirectory() as work:
        objects = []
        for suffix, flags in SETS.items():
            if flags and not x86:
                continue
            out = f"{work}/kernels{suffix}.o"
            run([COMPILER, *COMMON, *flags, f"-DSUFFIX={suffix}", "-c", str(SOURCE), "-o", out])
            objects.append(out)
        run([COMPILER, "-shared", *objects, "-o", str(target), "-Wl,--allow-shlib-undefined"])


def run(command: list[str]) -> None:
    """Run a compiler command, its messages kept for the error."""
    subprocess.run(command, check=True, capture_output=True, text=True)


setup(
    ext_modules=[Extension("rorqual.kernels.native._", [str(SOURCE)])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
