"""The warm fork server of the sandbox: a clean process that forks a confined child for each run.

It is started once (a new interpreter, so nothing of the caller's memory is in it), imports what runs will need,
and then only forks, watches deadlines and reaps. It talks with the sandbox over one socket: a request is a
length, a JSON object and six descriptors (control, payload, stdin, stdout, stderr, result). The control
descriptor carries one byte R when the child is confined and about to begin, then a JSON line about its end; any byte
from the other side, or its closing, kills the run.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import resource
import select
import shutil
import signal
import socket
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from rorqual.verify import kernel

NOBODY = 65534
FDS = 6
SETUP_FAILED = 117
WATCH = 0.02  # seconds between looks at a run's folder and at its deadline
PATIENCE = 10  # a run that got no processor may take this many times its limit
MAX_FILES = 256  # in a run's folder


@dataclass
class Run:
    """A child that is running."""

    pid: int
    control: socket.socket
    begin: float
    limit: float
    folder: str | None
    disk: int
    cause: str = ""  # why it was killed


class Server:
    """Forks, watches, reaps."""

    def __init__(self, main: socket.socket, setup: dict[str, Any]) -> None:
        self.main, self.setup = main, setup
        self.runs: dict[int, Run] = {}
        self.root = os.geteuid() == 0
        self.landlock, self.seccomp = kernel.landlock_abi(), kernel.seccomp_supported()
        self.program = kernel.filter_program() if self.seccomp else None
        self.ruleset = kernel.ruleset(setup["readable"]) if self.landlock else None
        self.poll = select.poll()
        self.wake, wake_in = os.pipe()
        os.set_blocking(self.wake, False)
        os.set_blocking(wake_in, False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.set_wakeup_fd(wake_in)
        self.poll.register(main, select.POLLIN)
        self.poll.register(self.wake, select.POLLIN)

    def serve(self) -> None:
        """Until the sandbox closes its end."""
        hello = {"landlock": self.landlock, "seccomp": self.seccomp, "root": self.root, "held": self.probe()}
        self.main.sendall(json.dumps(hello).encode() + b"\n")
        while True:
            events = dict(self.poll.poll(WATCH * 1000 if self.runs else None))
            if self.wake in events:
                os.read(self.wake, 4096)
            self.reap()
            for run in list(self.runs.values()):
                if run.control.fileno() in events:
                    self.kill(run, "stopped")
                self.watch(run)
            if self.main.fileno() in events and not self.accept():
                break
        for run in list(self.runs.values()):
            self.kill(run, "stopped")
            os.waitpid(run.pid, 0)
            self.clean(run)

    def probe(self) -> bool:
        """Whether a confined child is indeed denied the file system, sockets and fork."""
        pid = os.fork()
        if pid == 0:
            held = False
            try:
                self.drop()
                kernel.confine(self.ruleset, self.program)
                acts: list[Callable[[], Any]] = [os.fork, socket.socket, lambda: os.open("/etc/passwd", 0)]
                held = all(_denied(act) for act in acts)
            finally:
                os._exit(0 if held else 1)
        return os.waitpid(pid, 0)[1] == 0

    def accept(self) -> bool:
        """Start a run; False when the sandbox is gone."""
        try:
            head, ancillary, _, _ = self.main.recvmsg(4, socket.CMSG_SPACE(FDS * 4))
        except OSError:
            return False
        if len(head) < 4:
            return False
        fds: list[int] = []
        for _level, _kind, data in ancillary:
            fds += struct.unpack(f"{len(data) // 4}i", data)
        (size,) = struct.unpack("I", head)
        body = b""
        while len(body) < size:
            piece = self.main.recv(size - len(body))
            if not piece:
                return False
            body += piece
        assert len(fds) == FDS
        self.start(json.loads(body), fds)
        return True

    def start(self, request: dict[str, Any], fds: list[int]) -> None:
        control = socket.socket(fileno=fds[0])
        folder = None
        try:
            if request["disk"]:
                folder = tempfile.mkdtemp(prefix="rorqual-run-")
                if self.root:
                    os.chown(folder, NOBODY, NOBODY)
            begin = time.monotonic()
            pid = os.fork()
        except OSError as e:
            _say(control, {"error": f"{type(e).__name__}: {e}"})
            control.close()
            if folder is not None:
                shutil.rmtree(folder, ignore_errors=True)
            pid = None
        if pid == 0:
            self.child(request, fds, folder)
        for fd in fds[1:]:
            os.close(fd)
        if pid is not None:
            self.runs[pid] = Run(pid, control, begin, request["wall"], folder, request["disk"])
            self.poll.register(control, select.POLLIN)

    def child(self, request: dict[str, Any], fds: list[int], folder: str | None) -> None:
        """In the fork: become nobody, confined, then do what was asked. Never returns."""
        try:
            os.setsid()
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            control, payload_fd, stdin, stdout, stderr, result = fds
            with os.fdopen(payload_fd, "rb") as file:
                payload = file.read()
            for fd, place in ((stdin, 0), (stdout, 1), (stderr, 2)):
                os.dup2(fd, place)
            ruleset_fd = self.ruleset
            if folder is not None and self.landlock:
                ruleset_fd = kernel.ruleset(self.setup["readable"], [folder])
            _close_all_but({0, 1, 2, control, result, -1 if ruleset_fd is None else ruleset_fd})
            os.chdir(folder or "/")
            module, _, name = request["function"].partition(":")
            function: Callable[[Any, Callable[[str], None]], None] = getattr(
                importlib.import_module(module), name
            )
            _limit(request)
            self.drop()
            kernel.confine(ruleset_fd, self.program)
            os.write(control, b"R")
            os.close(control)
        except BaseException as e:
            os.write(2, f"{type(e).__name__}: {e}".encode())
            os._exit(SETUP_FAILED)
        code = 0
        try:
            _run(function, json.loads(payload), result)
        except BaseException:
            code = 1
        finally:
            os._exit(code)

    def drop(self) -> None:
        """From root to nobody, capabilities and groups included."""
        if self.root:
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)

    def watch(self, run: Run) -> None:
        """Kill a run that is past its limit or whose folder is too full. Time in which it wanted the processor and
        did not get it is not its fault and does not count, up to a bound."""
        if run.pid not in self.runs or run.cause:
            return
        spent = time.monotonic() - run.begin
        if spent > run.limit and (spent > PATIENCE * run.limit or spent - _waited(run.pid) > run.limit):
            self.kill(run, "timeout")
        elif run.folder is not None:
            try:
                sizes = list(_sizes(run.folder))
            except OSError:  # it has shut its own folder
                self.kill(run, "disk")
                return
            if sum(sizes) > run.disk or len(sizes) > MAX_FILES:
                self.kill(run, "disk")

    def kill(self, run: Run, cause: str) -> None:
        run.cause = run.cause or cause
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(run.pid, signal.SIGKILL)
        if cause == "stopped" and run.pid in self.runs:
            with contextlib.suppress(KeyError):
                self.poll.unregister(run.control)

    def reap(self) -> None:
        """Collect children that ended and say how."""
        while self.runs:
            try:
                pid, status, usage = os.wait4(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            run = self.runs.pop(pid, None)
            if run is None:
                continue
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)  # what it left behind, where nothing kept it from forking
            said = {
                "status": os.waitstatus_to_exitcode(status),
                "cause": run.cause,
                "cpu": usage.ru_utime + usage.ru_stime,
                "rss": usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024),
                "wall": time.monotonic() - run.begin,
            }
            _say(run.control, said)
            with contextlib.suppress(KeyError):
                self.poll.unregister(run.control)
            self.clean(run)

    def clean(self, run: Run) -> None:
        run.control.close()
        if run.folder is not None:
            shutil.rmtree(run.folder, ignore_errors=True)


def main(fd: int, setup: dict[str, Any]) -> None:
    """The whole life of the server process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.path += setup["paths"]
    for name in setup["preload"]:
        try:
            importlib.import_module(name)
        except ImportError:
            if name in setup["required"]:
                raise
    sys.path[:] = [p for p in sys.path if p not in setup["paths"] or p in setup["readable"]]
    gc.collect()
    gc.freeze()  # children share these pages for as long as nobody counts references in them
    Server(socket.socket(fileno=fd), setup).serve()


def _run(function: Callable[[Any, Callable[[str], None]], None], payload: Any, result: int) -> None:
    write = os.write

    def emit(line: str) -> None:
        data = line.encode("utf-8", "surrogatepass") + b"\n"
        while data:
            data = data[write(result, data) :]

    function(payload, emit)


def _limit(request: dict[str, Any]) -> None:
    cpu = math.ceil(request["wall"]) + 1
    limits = {
        "CPU": cpu,
        "AS": request["memory"],
        "FSIZE": request["disk"],
        "NOFILE": 64,
        "CORE": 0,
        "MEMLOCK": 0,
        "MSGQUEUE": 0,
    }
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}", None)
        if kind is None:
            continue
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):
            if sys.platform == "linux":  # elsewhere some limits cannot be set; such systems are unsafe anyway
                raise


def _close_all_but(keep: set[int]) -> None:
    last = -1
    for fd in sorted(f for f in keep if f >= 0):
        if fd > last + 1:  # closerange(0, 0) closes everything on some versions
            os.closerange(last + 1, fd)
        last = fd
    os.closerange(last + 1, min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 65536))


def _sizes(folder: str) -> Iterator[int]:
    """Of the files in a folder in which a run makes and removes them meanwhile."""
    with os.scandir(folder) as entries:
        for entry in entries:
            with contextlib.suppress(FileNotFoundError):
                if entry.is_file():
                    yield entry.stat(follow_symlinks=False).st_size


def _waited(pid: int) -> float:
    """Seconds that a process was ready to run and did not; 0 where the kernel does not say."""
    try:
        with open(f"/proc/{pid}/schedstat", encoding="ascii") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0


def _denied(act: Callable[[], Any]) -> bool:
    try:
        act()
    except OSError:
        return True
    return False


def _say(control: socket.socket, what: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        control.sendall(json.dumps(what).encode() + b"\n")
