"""The sandbox holds against every attack of attacks.py, as root and as an ordinary user, and leaves nothing behind."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rorqual.errors import ConfigError, SandboxError
from rorqual.verify.sandbox import NOBODY, Limits, Sandbox
from rorqual.verify.zygote import _sizes

ATTACKS = Path(__file__).parent / "attacks.py"
PROGRAM = "rorqual.verify.player:program"

linux = pytest.mark.skipif(sys.platform != "linux", reason="the sandbox is refused elsewhere")
pytestmark = linux


def ordinary_python() -> str | None:
    """An interpreter that the user nobody can start and that can read this package."""
    for python in (sys.executable, "/usr/bin/python3", "/usr/local/bin/python3"):
        try:
            done = subprocess.run([python, "-c", f"open({str(ATTACKS)!r})"], user=NOBODY, capture_output=True)
        except OSError:
            continue
        if done.returncode == 0:
            return python
    return None


def attack(folder: Path, kind: str = "native", rounds: int = 1, ordinary: bool = False) -> dict[str, Any]:
    """The report of attacks.py; nothing may have come to the port, and the secret must be whole."""
    user: dict[str, Any] = {}
    python: str | None = sys.executable
    if ordinary and os.geteuid() == 0:
        python = ordinary_python()
        if python is None:
            pytest.skip("no interpreter that an ordinary user can start")
        user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
    assert python is not None
    with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp:
        tcp.bind(("127.0.0.1", 0))
        tcp.listen()
        udp.bind(("127.0.0.1", tcp.getsockname()[1]))
        tcp.setblocking(False)
        udp.setblocking(False)
        command = [python, str(ATTACKS), str(folder), str(udp.getsockname()[1]), str(rounds), kind]
        done = subprocess.run(command, capture_output=True, text=True, cwd="/", **user)
        assert done.returncode == 0, done.stderr
        with pytest.raises(BlockingIOError):
            tcp.accept()
        with pytest.raises(BlockingIOError):
            udp.recv(10)
    assert (folder / "secret").read_text() == "secret"
    assert not list(folder.glob("escaped*"))
    report: dict[str, Any] = json.loads(done.stdout)
    return report


@pytest.mark.parametrize("ordinary", [False, True], ids=["as we are", "ordinary user"])
def test_every_attack_is_stopped(open_folder: Path, ordinary: bool) -> None:
    report = attack(open_folder, ordinary=ordinary)
    assert report["faults"] == {}
    assert report["count"] >= 40
    assert report["left"] == report["after_close"] == []
    assert report["uid"] != 0 or not ordinary


@pytest.mark.skipif(shutil.which("bwrap") is None, reason="no bubblewrap")
def test_bubblewrap_holds_too_and_is_never_started_as_root(open_folder: Path) -> None:
    report = attack(open_folder, kind="bubblewrap", ordinary=True)
    assert report["faults"] == {}
    assert report["features"]["root"] is False
    assert report["left"] == report["after_close"] == []


@pytest.mark.slow
@pytest.mark.parametrize("ordinary", [False, True], ids=["as we are", "ordinary user"])
def test_no_process_is_left_after_a_thousand_attacks(open_folder: Path, ordinary: bool) -> None:
    report = attack(open_folder, rounds=24, ordinary=ordinary)
    assert report["count"] >= 1000
    assert report["faults"] == {}
    assert report["left"] == report["after_close"] == []


def test_limits_hold_from_any_thread(sandbox: Sandbox) -> None:
    """karpathy/nanochat#145: a timeout by SIGALRM never fires in a worker thread."""
    limits = Limits(seconds=0.3)
    with ThreadPoolExecutor(8) as pool:
        results = list(
            pool.map(lambda _: sandbox.run(PROGRAM, {"source": "while True: pass"}, limits=limits), range(8))
        )
    assert [r.status for r in results] == ["timeout"] * 8
    assert sandbox._server is not None
    children = Path(f"/proc/{sandbox._server.pid}/task/{sandbox._server.pid}/children")
    if children.exists():
        assert children.read_text().split() == []


def test_runs_do_not_see_each_other(sandbox: Sandbox) -> None:
    limits = Limits(disk_mb=1)
    write = "import os, builtins; open('mine', 'w').write('x'); builtins.seen = 1; print(os.listdir('.'))"
    look = "import os, builtins; print(os.listdir('.'), hasattr(builtins, 'seen'))"
    assert sandbox.run(PROGRAM, {"source": write}, limits=limits).stdout == "['mine']\n"
    assert sandbox.run(PROGRAM, {"source": look}, limits=limits).stdout == "[] False\n"


def test_files_that_come_and_go_do_no_harm(sandbox: Sandbox) -> None:
    """A file that is gone between the listing and the look ended the server, and with it every neighbour's run."""
    source = (
        "import os, time\nend = time.time() + 0.4\nwhile time.time() < end:\n"
        "    for i in range(40): open(str(i), 'w').close()\n    for i in range(40): os.unlink(str(i))\n"
    )
    assert sandbox.run(PROGRAM, {"source": source}, limits=Limits(seconds=4, disk_mb=1)).status == "done"


def test_the_sizes_of_a_folder_pass_over_what_is_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "ab":
        (tmp_path / name).write_text("12345")
    entries = list(os.scandir(tmp_path))
    (tmp_path / "a").unlink()
    monkeypatch.setattr("os.scandir", lambda _: contextlib.nullcontext(entries))
    assert list(_sizes(str(tmp_path))) == [5]


def test_no_variable_of_ours_reaches_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("API_SECRET", "hunter2")
    with Sandbox() as sandbox:
        result = sandbox.run(PROGRAM, {"source": "import os; print('API_SECRET' in os.environ)"})
    assert result.stdout == "False\n"


def test_output_is_kept_and_errors_are_seen(sandbox: Sandbox) -> None:
    """huggingface/open-r1#687: no output captured and the failure invisible."""
    done = sandbox.run(PROGRAM, {"source": "print(int(input()) * 2)"}, stdin="3")
    assert (done.stdout, json.loads(done.lines[0])) == ("6\n", {"exit": 0})
    failed = sandbox.run(PROGRAM, {"source": "import sys; print('out'); sys.exit('no')"})
    assert (failed.stdout, failed.stderr, json.loads(failed.lines[0])) == ("out\n", "no\n", {"exit": 1})
    assert "ZeroDivisionError" in sandbox.run(PROGRAM, {"source": "1 / 0"}).stderr


def test_a_lost_server_is_an_error_and_the_next_run_has_a_new_one() -> None:
    with Sandbox() as sandbox:
        sandbox.start()
        assert sandbox._server is not None
        first = sandbox._server
        timer = threading.Timer(0.1, first.kill)
        timer.start()
        with pytest.raises(SandboxError, match="ended or fell silent"):
            sandbox.run(PROGRAM, {"source": "import time; time.sleep(30)"})
        timer.join()
        assert sandbox.run(PROGRAM, {"source": "print(1)"}).stdout == "1\n"


def test_what_cannot_confine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(SandboxError, match="only Linux can confine"):
        Sandbox()
    Sandbox(unsafe=True).close()


def test_a_server_that_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    hello = {"landlock": 0, "seccomp": True, "root": False, "held": False}
    monkeypatch.setattr("rorqual.verify.sandbox._hello", lambda _: hello)
    with pytest.raises(SandboxError, match="no landlock"), Sandbox() as sandbox:
        sandbox.start()


def test_options_that_mean_nothing_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"limits\.seconds=0"):
        Limits(seconds=0)
    with pytest.raises(ConfigError, match="kind='docker'"):
        Sandbox(kind="docker")  # type: ignore[arg-type]
    monkeypatch.setattr("shutil.which", lambda _: None)
    with pytest.raises(SandboxError, match="no bwrap"):
        Sandbox(kind="bubblewrap")
