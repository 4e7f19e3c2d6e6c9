"""The command from text to report on tiny models; runs are cached, reproducible, and resumed after a signal."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rorqual.compare.budget import Budget
from rorqual.compare.job import RESULT, Job, Silent, run
from rorqual.compare.pool import Pool
from rorqual.compare.pools import built_pool, found_pool
from rorqual.compare.setting import BASE, RECIPE
from rorqual.errors import RunError
from rorqual.train.run import train

TINY = Budget(
    "tiny", width=16, depth=2, heads=2, seq_len=16, batch_size=2, steps=30, vocab_size=320, pool_mb=1,
    fractions=(1, 3), more_rates=0, seeds=1, control_seeds=1, eval_rows=16,
)  # fmt: skip


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    for i in range(60):
        lines = [f"def function_{i}_{j}(value):\n    return value * {i} + {j * i}\n" for j in range(1, 20)]
        (folder / f"m{i}.py").write_text("\n".join(lines))
    return folder


@pytest.fixture(scope="module")
def pool(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_pool(tmp_path_factory.mktemp("built"), TINY, (str(text),), lambda _: None)


def test_a_run_gives_the_same_curve_again_and_is_kept(pool: Path, tmp_path: Path) -> None:
    losses = []
    for name in ("a", "b"):
        job = Job(RECIPE, TINY, 12, 0, pool, pool, tmp_path / name)
        found = run(job)
        assert found is not None
        assert job.result == found
        losses.append((found.loss, found.curve))
        assert not (job.config.out / "checkpoints").exists()
    assert losses[0] == losses[1]
    assert found.optimizer_flops > 0
    assert found.tokens == 12 * 32
    assert found.tables > 0


def test_a_pool_as_found_keeps_the_tokenizer_and_loses_what_leaks(
    text: Path, pool: Path, tmp_path: Path
) -> None:
    found = found_pool(tmp_path, pool, TINY, (str(text),), lambda _: None)
    assert (found / "tokenizer.json").read_bytes() == (pool / "tokenizer.json").read_bytes()
    tally = json.loads((found / "meta.json").read_text())["tally"]
    assert tally["kept"] < tally["documents"]  # the held-out documents of the built pool are in its sources


def test_other_sources_are_another_pool(text: Path, pool: Path) -> None:
    """A folder used before must not answer for text that was not asked for."""
    assert built_pool(pool.parent, TINY, (str(text),), lambda _: None) == pool
    assert built_pool(pool.parent, TINY, (str(text / "m1?.py"),), lambda _: None) != pool


def test_a_part_of_a_run_that_was_moved_is_begun_anew(pool: Path, tmp_path: Path) -> None:
    job = Job(RECIPE, TINY, 12, 0, pool, pool, tmp_path / "whole")
    whole = run(job)
    assert whole is not None
    part = dataclasses.replace(job, runs=tmp_path / "part")
    assert train(dataclasses.replace(part.config, stop_at=6), show=Silent()).step == 6
    moved = shutil.copytree(pool, tmp_path / "moved")
    again = run(dataclasses.replace(part, data=moved, target=moved))
    assert again is not None
    assert (again.loss, again.curve, again.folder) == (whole.loss, whole.curve, whole.folder)


def test_a_failed_run_is_named(pool: Path, tmp_path: Path) -> None:
    job = Job(BASE.at(optim__lr=1e30, optim__clip=0.0), TINY, 12, 0, pool, pool, tmp_path)
    with pytest.raises(RunError, match="not finite"):
        Pool(1, lambda _: None).all([job])


PROGRAM = """
import sys
from rorqual.compare import budget, command
from tests_tiny import TINY
if __name__ == "__main__":
    budget.PRESETS["quick"] = TINY
    sys.exit(command.compare(sys.argv[1:]))
"""


def test_the_command_stops_on_a_signal_and_goes_on_to_a_report(pool: Path, tmp_path: Path) -> None:
    (tmp_path / "tests_tiny.py").write_text(f"from rorqual.compare.budget import Budget\nTINY = {TINY!r}\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    out = tmp_path / "out"
    command = [
        sys.executable,
        "program.py",
        "--data",
        str(pool),
        "--out",
        str(out),
        "--only",
        "muon",
    ]
    env = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[2] / 'src'}:{tmp_path}"}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "seed 0" not in process.stderr.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 75
    kept = {p: p.read_bytes() for p in out.rglob(RESULT)}
    assert kept
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert {p: p.read_bytes() for p in kept} == kept  # what was there was not computed again
    tree = json.loads((out / "compare.json").read_text())
    assert set(tree["matches"]) == {
        "architecture and training", "against the baseline with the tables", "against the baseline under Muon",
    }  # fmt: skip
    assert {f["part"] for f in tree["factors"]} == {"muon"}
    assert "</svg>" in (out / "report.html").read_text()


@pytest.mark.slow
def test_every_option_finds_its_part_of_the_report(text: Path, tmp_path: Path) -> None:
    """The caches of five attentions, the pool as found, an idea of one's own, and each part taken out."""
    (tmp_path / "tests_tiny.py").write_text(f"from rorqual.compare.budget import Budget\nTINY = {TINY!r}\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    command = [
        sys.executable, "program.py", "--sources", str(text), "--out", "out", "--cache", "--data-half",
        "--no-controls", "--without", "all", "--idea", "optim.lr=0.01",
    ]  # fmt: skip
    env = os.environ | {"PYTHONPATH": f"{Path(__file__).parents[2] / 'src'}:{tmp_path}"}
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    tree = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert set(tree["matches"]) == {
        "architecture and training", "data alone", "architecture, training and data",
    }  # fmt: skip
    assert [f["part"] for f in tree["factors"]] == list(RECIPE.parts)
    assert len({r["cache_bytes"] for r in tree["runs"]}) >= 4
