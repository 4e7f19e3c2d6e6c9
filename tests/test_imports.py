"""Imports point one way, heavy libraries stay where they belong, and the command line starts light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SRC = Path(__file__).parent.parent / "src" / "rorqual"
LEAVES = {"errors", "config", "device"}
ALLOWED = {
    "kernels": set(),
    "text": set(),
    "verify": set(),
    "plan": {"checkpoint", "model"},
    "model": {"kernels"},
    "data": {"text"},
    "checkpoint": {"model", "text"},
    "engine": {"checkpoint", "model", "kernels", "text"},
    "parallel": {"model"},
    "train": {"parallel", "data", "checkpoint", "model", "kernels", "text"},
    "rl": {"engine", "train", "verify", "checkpoint", "model", "text", "data"},
    "eval": {"engine", "model", "data", "verify", "checkpoint", "text"},
    "compare": {"train", "data", "checkpoint", "model", "text"},
    "server": {"engine", "text"},
    "lab": {"train", "rl", "eval", "compare", "checkpoint", "data"},
}
TOP = {"cli", "demo", "__init__", "__main__"}  # may use everything below
ONLY_IN = {
    "starlette": {"server"},
    "uvicorn": {"server"},
    "prometheus_client": {"server"},
    "triton": {"kernels"},
    "ray": {"lab", "train"},
    "pyarrow": {"data"},
    "datasketch": {"data"},
}


def sources() -> list[Path]:
    return sorted(SRC.rglob("*.py"))


def imported(path: Path) -> set[str]:
    """Every module named in an import of the file, those inside functions and TYPE_CHECKING included."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            raise AssertionError(f"{path}:{node.lineno}: relative import; name the package")
    return names


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(SRC)))
def test_imports_point_one_way(path: Path) -> None:
    package = path.relative_to(SRC).parts[0].removesuffix(".py")
    for name in imported(path):
        parts = name.split(".")
        if parts[0] != "rorqual":
            home = ONLY_IN.get(parts[0])
            assert home is None or package in home, f"{name} belongs in {home}"
            continue
        if len(parts) == 1 or package in TOP:
            continue
        target = parts[1]
        if target in LEAVES or target == package or target.startswith("__"):
            continue
        assert package not in LEAVES, f"{package} is a leaf but imports {name}"
        assert target in ALLOWED.get(package, set()), f"{package} must not import {target}"


def test_ray_is_imported_in_two_files() -> None:
    """One for trials of the lab, one for the processes of a run."""
    users = {p.name for p in sources() if any(n.split(".")[0] == "ray" for n in imported(p))}
    assert users == {"ray_actors.py", "ray_workers.py"}


def test_no_pickle() -> None:
    """Checkpoints come from strangers: nothing here may run what they say (vllm-project/vllm#50309)."""
    for path in sources():
        names = imported(path)
        assert not {
            n for n in names if n.split(".")[0] in ("pickle", "dill", "cloudpickle", "marshal", "shelve")
        }, path
        text = path.read_text(encoding="utf-8")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert flags.get("weights_only") == "True", f"{path}:{node.lineno}"


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_the_command_line_starts_without_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from rorqual.cli import main; assert main(sys.argv[1:]) == 0; "
        "heavy = {'torch', 'transformers', 'starlette', 'pyarrow', 'numpy'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
