"""Code that is not trusted, run where it can do no harm.

>>> with Sandbox() as sandbox:
...     result = sandbox.run("rorqual.verify.player:program", {"source": "print(6 * 7)"})

Each run is a fork of a warm server (`zygote.py`): its own session, resource limits, the user nobody where we are
root, no privileges to gain, Landlock on the file system, and a system call filter without fork, threads, exec, sockets
or signals to others. A run is killed at its deadline, at its output limit and when the caller goes away. What a
run says of itself is never a verdict: callers compare the values that it returned.

Where the kernel cannot confine a process so, a sandbox is refused (SandboxError) unless `unsafe=True`.
`kind="bubblewrap"` puts the whole server in namespaces of its own besides.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import shutil
import socket
import struct
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from rorqual.errors import ConfigError, SandboxError

SRC = str(Path(__file__).resolve().parents[2])
NOBODY = 65534
GRACE = 20.0  # seconds beyond its limit after which a server that says nothing is given up
START = 60.0  # seconds in which a server must have imported what it preloads
# Modules that short programs use. They are imported once, before the forks.
# fmt: off
COMMON = (
    "rorqual.verify.player", "abc", "array", "base64", "binascii", "bisect", "calendar", "cmath",
    "collections", "contextlib", "copy", "csv", "dataclasses", "datetime", "decimal", "difflib", "enum",
    "fractions", "functools", "hashlib", "heapq", "html", "io", "itertools", "json", "keyword", "math",
    "numbers", "operator", "pprint", "queue", "random", "re", "secrets", "statistics", "string", "struct",
    "textwrap", "time", "timeit", "traceback", "types", "typing", "unicodedata", "urllib.parse", "uuid",
    "warnings", "zlib",
)
# fmt: on


@dataclass(frozen=True)
class Limits:
    """What one run may use."""

    seconds: float = 5.0  # of wall time in which it had or could have had a processor
    memory_mb: int = 512  # of address space
    output_kb: int = 256  # of stdout and of stderr
    result_kb: int = 4096  # of returned values
    disk_mb: int = 0  # of files in a folder of its own; 0: it writes no file

    def __post_init__(self) -> None:
        for name in ("seconds", "memory_mb", "output_kb", "result_kb"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"limits.{name}={getattr(self, name)}: must be above 0")
        if self.disk_mb < 0:
            raise ConfigError(f"limits.disk_mb={self.disk_mb}: must be 0 or more")


Status = Literal["done", "signal", "timeout", "output", "disk"]


@dataclass(frozen=True)
class Result:
    """How a run ended. `lines` is what it returned, line by line, and is as little to be trusted as its output."""

    status: Status
    code: int  # exit code, or minus the signal
    lines: tuple[str, ...]
    stdout: str
    stderr: str
    cpu_seconds: float
    wall_seconds: float
    peak_bytes: int


class Sandbox:
    """A fork server and its runs. Usable from many threads at once; each process needs its own.

    `preload` names modules beyond the common ones, found in the folders `paths`, which runs may then read too.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        *,
        kind: Literal["native", "bubblewrap"] = "native",
        preload: Sequence[str] = (),
        paths: Sequence[str] = (),
        unsafe: bool = False,
        python: str = sys.executable,
    ) -> None:
        if kind not in ("native", "bubblewrap"):
            raise ConfigError(f"sandbox kind={kind!r}: must be native or bubblewrap")
        self.limits = limits or Limits()
        self.kind, self.unsafe, self.python = kind, unsafe, python
        self.preload, self.paths = tuple(preload), tuple(paths)
        self.features: dict[str, Any] = {}
        self._lock = threading.Lock()
        self._server: subprocess.Popen[bytes] | None = None
        self._main: socket.socket | None = None
        self._owner = os.getpid()
        if sys.platform != "linux" and not unsafe:
            raise SandboxError(
                f"{sys.platform}: only Linux can confine untrusted code (Landlock and seccomp); use a Linux machine "
                "or container, or unsafe=True if you trust the code"
            )
        if kind == "bubblewrap" and shutil.which("bwrap") is None:
            raise SandboxError(
                "sandbox kind=bubblewrap: there is no bwrap here; install bubblewrap or use native"
            )

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the server and every run."""
        with self._lock:
            self._stop()

    def start(self) -> None:
        """Start the server now instead of at the first run, and hear what the kernel offers."""
        with self._lock:
            self._ensure()

    def run(
        self, function: str, payload: Mapping[str, Any], *, stdin: str = "", limits: Limits | None = None
    ) -> Result:
        """Call `function` ("module:name", one that is preloaded) with `payload` in a confined fork.

        Raises SandboxError where the sandbox failed; whatever the code itself does is a Result.
        """
        limits = limits or self.limits
        request = {
            "function": function,
            "wall": limits.seconds,
            "memory": limits.memory_mb << 20,
            "disk": limits.disk_mb << 20,
        }
        try:
            fds = _Descriptors(json.dumps(payload).encode(), stdin.encode("utf-8", "surrogatepass"))
        except OSError as e:
            raise SandboxError(f"sandbox: {e}; too many runs at once, or too many open files?") from e
        with fds:
            with self._lock:
                main = self._ensure()
                body = json.dumps(request).encode()
                try:
                    main.settimeout(GRACE)
                    socket.send_fds(main, [struct.pack("I", len(body)) + body], fds.theirs)
                except OSError as e:
                    self._stop()
                    raise SandboxError(f"sandbox: its server is gone ({e})") from e
            fds.close_theirs()
            return self._collect(fds, limits)

    def _collect(self, fds: _Descriptors, limits: Limits) -> Result:
        """Read a run to its end."""
        caps = {
            "stdout": limits.output_kb << 10,
            "stderr": limits.output_kb << 10,
            "result": limits.result_kb << 10,
        }
        got = {name: bytearray() for name in caps}
        said, over, lost = bytearray(), False, False
        deadline = time.monotonic() + 11 * limits.seconds + GRACE
        with selectors.DefaultSelector() as selector:
            selector.register(fds.control, selectors.EVENT_READ, "control")
            for name, fd in fds.ours.items():
                selector.register(fd, selectors.EVENT_READ, name)
            while not said.endswith(b"\n") and not lost:
                for key, _ in selector.select(max(0.0, deadline - time.monotonic())):
                    if key.data == "control":
                        piece = fds.control.recv(65536)
                        said += piece
                        lost = not piece
                    elif not _take(key.fd, got[key.data], caps[key.data]):
                        selector.unregister(key.fd)
                    if key.data != "control" and len(got[key.data]) > caps[key.data] and not over:
                        over = True
                        fds.control.send(b"K")
                lost = lost or time.monotonic() > deadline
        for name, fd in fds.ours.items():  # what was written before the end and not yet read
            while len(got[name]) <= caps[name] and _take(fd, got[name], caps[name]):
                pass
        began = said.startswith(b"R")
        if lost and not said.endswith(b"\n"):
            with self._lock:
                self._stop()
            raise SandboxError("sandbox: its server ended or fell silent during a run")
        end = json.loads(bytes(said[began:]))
        texts = {k: bytes(v[: caps[k]]).decode("utf-8", "replace") for k, v in got.items()}
        if "error" in end or (not began and not end["cause"]):
            raise SandboxError(
                f"sandbox: a run could not begin: {end.get('error') or texts['stderr'][:300]} {end}"
            )
        status: Status = "done" if end["status"] >= 0 else "signal"
        if over:
            status = "output"
        elif end["cause"] in ("timeout", "disk"):
            status = end["cause"]
        elif end["status"] == -24:  # SIGXCPU: the processor time ran out before the wall clock did
            status = "timeout"
        lines = texts["result"].split("\n")
        return Result(
            status,
            end["status"],
            tuple(lines[:-1]),  # a last line without its end was cut
            texts["stdout"],
            texts["stderr"],
            end["cpu"],
            end["wall"],
            end["rss"],
        )

    def _ensure(self) -> socket.socket:
        if self._owner != os.getpid():
            raise SandboxError("sandbox: made in another process; make one in each process after the fork")
        if self._main is not None and self._server is not None and self._server.poll() is None:
            return self._main
        self._stop()
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                self._server = self._launch(theirs.fileno())
            self.features = _hello(ours)
        except (OSError, ValueError) as e:
            self._main = ours
            self._stop()
            raise SandboxError(f"sandbox: its server did not start ({e or 'no answer'})") from e
        self._main = ours
        if not self.features["held"] and not self.unsafe:
            lacks = [name for name in ("landlock", "seccomp") if not self.features[name]]
            why = f"no {' and no '.join(lacks)}" if lacks else "a trial run got out"
            self._stop()
            raise SandboxError(
                f"sandbox: this system does not confine a process ({why}); use a Linux kernel of 5.13 or newer with "
                "Landlock and seccomp, or unsafe=True if you trust the code"
            )
        atexit.register(self.close)
        return ours

    def _launch(self, fd: int) -> subprocess.Popen[bytes]:
        readable = [*_standard_library(self.python), *self.paths, "/dev/urandom", "/dev/null"]
        setup = {
            "readable": readable,
            "paths": list(self.paths),
            "preload": [*COMMON, *self.preload],
            "required": ["rorqual.verify.player", *self.preload],
        }
        code = (
            f"import sys, json; sys.path[:] = [{SRC!r}] + [p for p in sys.path if p]; "
            "from rorqual.verify import zygote; import rorqual.verify.player; "
            "zygote.main(int(sys.argv[1]), json.loads(sys.argv[2]))"
        )
        # No site (its .pth files run code of the environment) and no variables of ours, secrets included.
        command = [os.path.realpath(self.python), "-s", "-S", "-B", "-c", code, str(fd), json.dumps(setup)]
        environment = {
            "PYTHONHASHSEED": "0",
            "PYTHONUTF8": "1",
            "LANG": "C.UTF-8",
            "TMPDIR": tempfile.gettempdir(),
        }
        user: dict[str, Any] = {}
        if self.kind == "bubblewrap":
            command = [*_bubblewrap(readable, self.python), *command]
            if os.geteuid() == 0:
                # Root's processes are exempt from limits on their number, and root in a namespace is still root.
                user = {"user": NOBODY, "group": NOBODY, "extra_groups": []}
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=None if os.environ.get("RORQUAL_SANDBOX_DEBUG") else subprocess.DEVNULL,
            pass_fds=(fd,),
            env=environment,
            cwd="/",
            start_new_session=True,
            **user,
        )

    def _stop(self) -> None:
        if self._owner != os.getpid():
            return
        if self._main is not None:
            self._main.close()
        if self._server is not None:
            try:
                self._server.wait(5)
            except subprocess.TimeoutExpired:
                self._server.kill()
                self._server.wait()
        self._main = self._server = None
        atexit.unregister(self.close)


class _Descriptors:
    """The two ends of everything that a run reads and writes."""

    def __init__(self, payload: bytes, stdin: bytes) -> None:
        self.ours: dict[str, int] = {}
        self.theirs: list[int] = []
        self.control, theirs = socket.socketpair()
        try:
            self.theirs.append(theirs.detach())
            self.theirs += [_file(payload), _file(stdin)]
            for name in ("stdout", "stderr", "result"):
                self.ours[name], write = os.pipe()
                os.set_blocking(self.ours[name], False)
                self.theirs.append(write)
        except OSError:
            self.__exit__()
            raise

    def __enter__(self) -> _Descriptors:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_theirs()
        self.control.close()
        for fd in self.ours.values():
            os.close(fd)
        self.ours = {}

    def close_theirs(self) -> None:
        for fd in self.theirs:
            os.close(fd)
        self.theirs = []


def _file(data: bytes) -> int:
    """A nameless file with these bytes, at its beginning."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("run", os.MFD_CLOEXEC)
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(data)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def _take(fd: int, into: bytearray, cap: int) -> bool:
    """Read what is there, up to just over the cap; False at the end or where nothing is there."""
    try:
        piece = os.read(fd, 65536)
    except BlockingIOError:
        return False
    if len(into) <= cap:
        into += piece
    return bool(piece)


def _hello(main: socket.socket) -> dict[str, Any]:
    """The first line that a server says."""
    main.settimeout(START)
    said = b""
    while not said.endswith(b"\n"):
        piece = main.recv(4096)
        if not piece:
            raise OSError("it ended at once")
        said += piece
    hello: dict[str, Any] = json.loads(said)
    return hello


_LIBRARIES: dict[str, list[str]] = {}


def _standard_library(python: str) -> list[str]:
    """The folders of an interpreter's standard library."""
    if python == sys.executable:
        paths = sysconfig.get_paths()
        return (
            sorted({os.path.realpath(paths["stdlib"]), os.path.realpath(paths["platstdlib"])} - {""})[:1]
            or []
        )
    if python not in _LIBRARIES:
        code = "import sysconfig; print(sysconfig.get_paths()['stdlib'])"
        out = subprocess.run([python, "-s", "-S", "-c", code], capture_output=True, text=True)
        if out.returncode:
            raise SandboxError(f"sandbox python={python}: does not run ({out.stderr.strip()[-200:]})")
        _LIBRARIES[python] = [os.path.realpath(out.stdout.strip())]
    return _LIBRARIES[python]


def _bubblewrap(readable: Sequence[str], python: str) -> list[str]:
    """bwrap with namespaces of its own for everything, seeing the interpreter and our verifier only."""
    package = Path(SRC) / "rorqual"
    ours = [package / "__init__.py", package / "errors.py", package / "verify"]
    prefix = Path(os.path.realpath(python)).parents[1]
    paths = ["/usr", "/lib", "/lib64", "/etc/ld.so.cache", *map(str, ours), str(prefix), *readable]
    binds = [a for p in paths if not p.startswith("/dev/") for a in ("--ro-bind-try", p, p)]
    return [
        *("bwrap", "--unshare-all", "--die-with-parent", "--new-session"),
        *("--dev", "/dev", "--proc", "/proc", "--tmpfs", "/tmp", *binds, "--chdir", "/", "--"),
    ]
