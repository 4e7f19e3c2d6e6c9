"""What the lab says and reads: spaces, evidence, the page, the command line."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rorqual.cli import main
from rorqual.errors import ConfigError, DataError, RunError
from rorqual.lab.evidence import changes, effects
from rorqual.lab.idea import Idea, submit
from rorqual.lab.job import curve, seen
from rorqual.lab.page import server
from rorqual.lab.report import write_report
from rorqual.lab.space import Space
from rorqual.lab.store import Store
from rorqual.lab.top import screen

Make = Callable[..., Any]


def test_a_space_is_drawn_from_its_seed_and_covers_every_axis() -> None:
    space = Space.parse(["optim.lr=0.001..0.1:log", "shape.experts=4..12:int", "shape.balance=bias|loss"])
    points = space.draw(9, seed=1)
    assert points == space.draw(9, seed=1) != space.draw(9, seed=2)
    assert sorted(p["shape.experts"] for p in points) == list(range(4, 13))
    assert all(0.001 <= p["optim.lr"] <= 0.1 for p in points)


@pytest.mark.parametrize("word", ["lr", "lr=2..1", "lr=0..1:log", "lr=1..2:even", "lr=a..b"])
def test_a_range_that_means_nothing_is_refused(word: str) -> None:
    with pytest.raises(ConfigError, match="--vary"):
        Space.parse([word])


def test_the_setting_that_matters_is_found_and_the_others_are_not() -> None:
    rows = [({"a": i % 3, "b": (i * 7) % 4}, float(i % 3)) for i in range(24)]
    found = {e.key: e for e in effects(rows)}
    assert found["a"].mattered
    assert found["a"].share == pytest.approx(1.0)
    assert found["a"].groups[0][:2] == ("0", 8)
    assert not found["b"].mattered


def test_an_idea_is_judged_against_the_noise_of_repeats() -> None:
    """Repeats at 1.0, 1.1 and 1.2: a standard deviation of 0.1; 1.0 below their mean is beyond it, 0.05 is not."""
    rows = [({}, 1.0), ({"seed": 1}, 1.1), ({"seed": 2}, 1.2), ({"x": 1}, 0.1), ({"y": 1}, 1.05)]
    by = {str(dict(c.settings)): c for c in changes(rows)}
    assert by["{'x': 1}"].sure
    assert by["{'x': 1}"].noise == pytest.approx(0.1)
    assert not by["{'y': 1}"].sure


def test_the_page_the_report_and_the_command_line_tell_the_same_story(
    make_lab: Make, tmp_path: Any, capsys: Any
) -> None:
    lab = make_lab(slots=2)
    for i in range(9):
        lab.add(float(i), who="<b>ada")
    lab.finish()
    folder = str(lab.store.folder)
    running = server(lab.store.folder, "127.0.0.1", 0)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        base = f"http://127.0.0.1:{running.server_port}"
        with urllib.request.urlopen(base + "/api/trial/1") as answer:
            one = json.load(answer)
        with urllib.request.urlopen(base + "/api/lab") as answer:
            whole = json.load(answer)
        with urllib.request.urlopen(base + "/") as answer:
            page = answer.read().decode()
    finally:
        running.shutdown()
        running.server_close()
    assert one["verdict"].startswith("ran to the end: 1 of")
    assert len(whole["ideas"]) == 9
    assert "http://" not in page.replace("http://www.w3.org/2000/svg", "")
    text, path = write_report(lab.store, None, tmp_path / "report.html")
    assert text.splitlines()[1].startswith("  Best: trial 1 ")
    assert "<b>ada" not in path.read_text(encoding="utf-8")
    assert main(["lab", "status", "--lab", folder]) == 0
    assert main(["lab", "show", "1", "--lab", folder]) == 0
    said = capsys.readouterr().out
    assert "goes on to step 3" in said


def test_what_is_not_finite_breaks_no_page(make_lab: Make) -> None:
    lab = make_lab()
    lab.add(1.0, clip=math.inf)
    lab.look()
    log = lab.store.folder_of(lab.store.trial(1)) / "run" / "metrics.jsonl"
    log.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "loss": NaN}\n{"step": 3, "loss": Infinity}\n')
    lab.look(2.0)
    assert curve(log.parents[1], "loss") == [(1, 2.0)]
    assert seen(log.parents[1], "loss") == (3, None)
    assert "curves of loss" in screen(lab.store)
    running = server(lab.store.folder, "127.0.0.1", 0)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    try:
        base = f"http://127.0.0.1:{running.server_port}"
        for path in ("/api/lab", "/api/lab?story=%C2%B2", "/api/trial/1"):
            with urllib.request.urlopen(base + path) as answer:
                json.load(answer, parse_constant=pytest.fail)
        with pytest.raises(urllib.error.HTTPError, match="404"):
            urllib.request.urlopen(f"{base}/api/trial/{10**19}")
    finally:
        running.shutdown()
        running.server_close()
    with pytest.raises(RunError, match="not in"):
        lab.store.withdraw(10**19, "ada")


def test_who_is_measured_on_another_text_does_not_compete(token_set: Path, tmp_path: Path) -> None:
    other = shutil.copytree(token_set, tmp_path / "other")
    meta = json.loads((other / "meta.json").read_text())
    meta["splits"]["heldout"][0]["sha256"] = "0" * 64
    (other / "meta.json").write_text(json.dumps(meta))
    store = Store(tmp_path / "lab")
    same = shutil.copytree(token_set, tmp_path / "same")
    studies = [submit(store, Idea(data=(d,), steps=9)).study for d in (token_set, same, other)]
    fewer = submit(store, Idea(data=(token_set,), steps=9, settings={"eval_rows": 2})).study
    assert studies[0] == studies[1]
    assert len({studies[0], studies[2], fewer}) == 3
    (other / "meta.json").write_text("{}")
    with pytest.raises(DataError, match="json: damaged"):
        submit(store, Idea(data=(other,), steps=9))


def test_a_slip_in_a_space_opens_none_of_it(token_set: Path, tmp_path: Path, capsys: Any) -> None:
    words = ["--data", str(token_set), "--steps", "9", "--grid", "--hold", "--lab", str(tmp_path / "lab")]
    assert main(["lab", "space", "--vary", "schedule.name=cosine|wsd|wavy", *words]) == 2
    assert Store(tmp_path / "lab").trials() == []
    for command, said in ((" ", "empty"), ("python 'x", "close every quote")):
        more = ["--command", command, "--steps", "9", "--hold", "--lab", str(tmp_path / "lab")]
        assert main(["lab", "try", *more]) == 2
        assert said in capsys.readouterr().err


def test_a_slip_costs_no_slot(tmp_path: Any, capsys: Any) -> None:
    (tmp_path / "a.toml").write_text("stepz = 9\n")
    assert main(["lab", "try", str(tmp_path / "a.toml"), "--lab", str(tmp_path / "lab")]) == 2
    assert "did you mean 'steps'" in capsys.readouterr().err
    assert main(["lab", "status", "--lab", str(tmp_path / "nowhere")]) == 2


def test_status_imports_nothing_heavy(make_lab: Make) -> None:
    lab = make_lab()
    lab.add(1.0)
    code = (
        "import sys; from rorqual.cli import main; assert main(['lab', 'status', '--lab', sys.argv[1]]) == 0; "
        "heavy = {'torch', 'numpy', 'tyro', 'rich', 'psutil'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code, str(lab.store.folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
