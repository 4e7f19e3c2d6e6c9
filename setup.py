"""Builds the native kernels when the package is installed; everything else is in pyproject.toml.

They need a C++ compiler that takes gcc's options, and no torch: a plain C interface, so one wheel serves
every Python 3. Without a compiler, or where it fails, the package installs all the same and computes with
torch.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = Path("src/rorqual/kernels/native")
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
# Products are contracted only where the source says so: a row's result must not depend on its neighbours.
FLAGS = ["-std=c++17", "-O3", "-fPIC", "-fopenmp", "-fvisibility=hidden", "-fno-math-errno"]
FLAGS += ["-ffp-contract=off", "-Wall"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mavx512bf16", *AVX2]
VARIANTS = {"portable": [], "avx2": AVX2, "avx512": AVX512}
X86 = platform.machine().lower() in ("x86_64", "amd64")


def source_hash() -> str:
    """What the library was built from; rorqual.kernels.native refuses one built from other sources."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.glob("*")):
        if path.suffix in (".cpp", ".h"):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


class BuildNative(build_ext):
    """One object a variant, each with its own instruction set, joined into one library."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"  # no Python ABI in the name: none is used

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        try:
            with tempfile.TemporaryDirectory() as work:
                self._build(target, Path(work))
        except (OSError, subprocess.CalledProcessError) as e:
            why = getattr(e, "stderr", None) or str(e)
            print(
                f"native kernels were not built, torch computes instead: {why.strip()[:500]}", file=sys.stderr
            )

    def _build(self, target: Path, work: Path) -> None:
        wanted = VARIANTS if X86 else {"portable": []}
        jobs = [(f"{name}.cpp", flags) for name, flags in wanted.items()]
        defines = [f'-DRORQUAL_SOURCE_HASH="{source_hash()}"', *(["-DRORQUAL_X86"] if X86 else [])]
        jobs.append(("dispatch.cpp", defines))
        running = []
        for name, flags in jobs:
            out = work / f"{name}.o"
            command = [*COMPILER, *FLAGS, *flags, "-c", str(SOURCES / name), "-o", str(out)]
            running.append((command, subprocess.Popen(command, stderr=subprocess.PIPE, text=True)))
        for command, process in running:
            _, errors = process.communicate()
            if process.returncode:
                raise subprocess.CalledProcessError(process.returncode, command, stderr=errors)
        objects = [str(work / f"{name}.o") for name, _ in jobs]
        command = [*COMPILER, "-shared", "-fopenmp", *objects, "-o", str(target)]
        subprocess.run(command, check=True, stderr=subprocess.PIPE, text=True)

    def copy_extensions_to_source(self) -> None:
        """In an editable install the library lies beside its Python file; a failed build leaves none there."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            there = Path("src") / self.get_ext_filename(ext.name)
            there.unlink(missing_ok=True)
            if built.is_file():
                shutil.copy2(built, there)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).is_file()]

    def get_output_mapping(self) -> dict[str, str]:
        return {out: source for out, source in super().get_output_mapping().items() if Path(source).is_file()}


class Wheel(bdist_wheel):
    """py3-none-PLATFORM with the library in it, py3-none-any without."""

    def get_tag(self) -> tuple[str, str, str]:
        if not self.distribution.ext_modules:
            return super().get_tag()
        build = self.get_finalized_command("build_ext")
        built = any(Path(p).suffix == ".so" for p in build.get_outputs())
        return ("py3", "none", super().get_tag()[2] if built else "any")


setup(
    ext_modules=[Extension("rorqual.kernels.native.librorqual", [])] if shutil.which(COMPILER[0]) else [],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
