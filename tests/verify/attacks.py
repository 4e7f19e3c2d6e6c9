"""Attacks on the sandbox. Each prints ESCAPED where it got what it wanted. Standard library only, so that an
ordinary user can run this file with any interpreter: `python attacks.py FOLDER PORT ROUNDS KIND` prints a JSON report.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

LIBC = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\n"
TRY = """
def attempt(act):
    try:
        act()
    except (OSError, RuntimeError, ImportError):
        return
    print("ESCAPED", flush=True)
"""
# name: (source, statuses that are right, disk_mb)
ATTACKS: dict[str, tuple[str, tuple[str, ...], int]] = {
    "endless loop": ("while True: pass", ("timeout",), 0),
    "loop that catches everything": (
        "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
        ("timeout",),
        0,
    ),
    "loop in C": ("sum(range(10**12))", ("timeout",), 0),
    "loop that ignores signals": (
        "import signal\nfor s in range(1, 32):\n    try: signal.signal(s, signal.SIG_IGN)\n"
        "    except (OSError, ValueError): pass\nwhile True: pass",
        ("timeout",),
        0,
    ),
    "sleep": ("import time\ntime.sleep(600)", ("timeout",), 0),
    "wait for input": ("import select\nselect.select([], [], [])", ("timeout",), 0),
    "fork bomb": ("import os\nwhile True:\n    os.fork()\n    print('ESCAPED', flush=True)", ("done",), 0),
    "vfork and clone": (
        LIBC
        + "for call in ((56, 17), (57,), (58,)):\n    r = libc.syscall(*call)\n    if r >= 0: print('ESCAPED')",
        ("done", "signal"),
        0,
    ),
    "clone3": (LIBC + "if libc.syscall(435, None, 0) >= 0: print('ESCAPED')", ("done",), 0),
    "threads": (TRY + "import threading\nattempt(threading.Thread(target=print).start)", ("done",), 0),
    "subprocess": (TRY + "import subprocess\nattempt(lambda: subprocess.run(['/bin/true']))", ("done",), 0),
    "exec": (TRY + "import os\nattempt(lambda: os.execv('/bin/echo', ['echo', 'ESCAPED']))", ("done",), 0),
    "memory at once": ("x = bytearray(8 << 30)\nprint('ESCAPED')", ("done",), 0),
    "memory by and by": (
        "x = []\nwhile True: x.append(bytearray(1 << 20))",
        ("done", "signal", "timeout"),
        0,
    ),
    "memory nobody touches": (
        "import mmap\nx = [mmap.mmap(-1, 1 << 30) for _ in range(64)]\nprint('ESCAPED')",
        ("done",),
        0,
    ),
    "memory in memfd": (TRY + "import os\nattempt(lambda: os.memfd_create('x'))", ("done",), 0),
    "huge output": ("while True: print('x' * 65536)", ("output",), 0),
    "huge errors": ("import sys\nwhile True: sys.stderr.write('x' * 65536)", ("output",), 0),
    "output to every descriptor": (
        "import os\nwhile True:\n    for fd in range(64):\n        try: os.write(fd, b'x' * 4096)\n"
        "        except OSError: pass",
        ("output",),
        0,
    ),
    "write outside": (
        TRY
        + "import os\nfor p in ('escaped', '/tmp/escaped', '/var/tmp/escaped', '/dev/shm/escaped', '/etc/escaped',\n"
        "          '{folder}/escaped', '{folder}/secret', os.path.expanduser('~/escaped')):\n"
        "    attempt(lambda: open(p, 'a').write('x'))",
        ("done",),
        0,
    ),
    "write outside with a folder": (
        TRY
        + "import os\nopen('mine', 'w').write('x')\nfor p in ('../escaped', '/tmp/escaped', '{folder}/secret'):\n"
        "    attempt(lambda: open(p, 'a').write('x'))\nattempt(lambda: os.rename('mine', '/tmp/escaped'))\n"
        "attempt(lambda: os.symlink('/etc/passwd', 'l'))\nattempt(lambda: os.mkfifo('f'))",
        ("done",),
        1,
    ),
    "delete outside": (
        TRY + "import os\nattempt(lambda: os.unlink('{folder}/secret'))\n"
        "attempt(lambda: os.rename('{folder}/secret', '{folder}/gone'))\n"
        "attempt(lambda: os.chmod('{folder}/secret', 0))\n"
        "attempt(lambda: os.truncate('{folder}/secret', 0))",
        ("done",),
        0,
    ),
    "read outside": (
        TRY
        + "import os\nfor p in ('/etc/shadow', '/etc/passwd', '{folder}/secret', '{repo}/pyproject.toml',\n"
        "          '/proc/self/environ', '/proc/self/maps', '/proc/self/mem', '/proc/1/environ', '/proc/meminfo',\n"
        "          f'/proc/{os.getppid()}/environ', f'/proc/{os.getppid()}/mem', '/dev/mem', '/dev/kmsg'):\n"
        "    attempt(lambda: open(p, 'rb').read(1))\n"
        "for p in ('/', '/tmp', '/proc', '/home', os.path.expanduser('~'), '{repo}', '{folder}'):\n"
        "    attempt(lambda: os.listdir(p))",
        ("done",),
        0,
    ),
    "TCP": (
        TRY + "import socket\nattempt(lambda: socket.create_connection(('127.0.0.1', {port})))",
        ("done",),
        0,
    ),
    "UDP": (
        TRY + "import socket\nattempt(lambda: socket.socket(2, 2).sendto(b'ESCAPED', ('127.0.0.1', {port})))",
        ("done",),
        0,
    ),
    "unix sockets": (
        TRY + "import socket\nattempt(socket.socketpair)\nattempt(lambda: socket.socket(1, 1))",
        ("done",),
        0,
    ),
    "raw sockets": (
        LIBC + "for d in (16, 17, 40): \n    if libc.socket(d, 3, 0) >= 0: print('ESCAPED')",
        ("done",),
        0,
    ),
    "kill the parent": (
        TRY
        + "import os\nfor p in (os.getppid(), 1, -1, 0, -os.getppid()):\n    attempt(lambda: os.kill(p, 9))",
        ("done",),
        0,
    ),
    "kill by other calls": (
        LIBC
        + "for call in ((200, os.getppid(), 9), (234, os.getppid(), os.getppid(), 9), (129, os.getppid(), 9, 0),\n"
        "             (297, os.getppid(), os.getppid(), 9, 0), (434, os.getppid(), 0)):\n"
        "    if libc.syscall(*call) >= 0: print('ESCAPED')",
        ("done",),
        0,
    ),
    "signals by descriptor owner": (
        TRY + "import fcntl, os\nattempt(lambda: fcntl.fcntl(0, 8, os.getppid()))\n"
        "attempt(lambda: fcntl.fcntl(0, 10, 9))\nattempt(lambda: fcntl.fcntl(1, 1031, 1 << 20))",
        ("done",),
        0,
    ),
    "ptrace": (
        LIBC
        + "for request in (16, 0x4206):\n    if libc.ptrace(request, os.getppid(), 0, 0) == 0: print('ESCAPED')\n"
        "b = ctypes.create_string_buffer(64)\nif libc.syscall(310, os.getppid(), b, 1, b, 1, 0) >= 0: print('ESCAPED')",
        ("done",),
        0,
    ),
    "become root": (
        TRY + "import os\nattempt(lambda: os.setuid(0))\nattempt(lambda: os.setresuid(0, 0, 0))\n"
        "attempt(lambda: os.chroot('/'))",
        ("done",),
        0,
    ),
    "namespaces and mounts": (
        LIBC
        + "for r in (libc.unshare(0x10000000), libc.mount(b'x', b'/', b'tmpfs', 0, 0), libc.syscall(425, 1, 0),\n"
        "          libc.syscall(321, 0, 0, 0), libc.syscall(250, 0, 0, 0), libc.syscall(298, 0, 0, -1, -1, 0)):\n"
        "    if r >= 0: print('ESCAPED')",
        ("done",),
        0,
    ),
    "raise limits": (
        TRY + "import resource\n"
        "attempt(lambda: resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2))\n"
        "attempt(lambda: resource.prlimit(__import__('os').getppid(), resource.RLIMIT_CPU, (1, 1)))",
        ("done",),
        0,
    ),
    "undo the filter": (
        LIBC
        + "for r in (libc.prctl(22, 0, 0, 0, 0), libc.prctl(38, 0, 0, 0, 0), libc.syscall(0x40000000 + 57)):\n"
        "    if r >= 0: print('ESCAPED')",
        ("done", "signal"),
        0,
    ),
    "outlive the run": (
        "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        time.sleep(600)\n"
        "    os._exit(0)\nprint('ESCAPED', flush=True)",
        ("done",),
        0,
    ),
    "a file of 300 MB": (
        "with open('big', 'wb') as f:\n    for _ in range(300): f.write(bytes(1 << 20))\nprint('ESCAPED')",
        ("done", "signal", "disk"),
        8,
    ),
    "many files": (
        "i = 0\nwhile True:\n    i += 1\n    with open(str(i), 'wb') as f: f.write(bytes(1 << 19))",
        ("disk", "done"),
        8,
    ),
    "deep recursion": (
        "import sys\nsys.setrecursionlimit(10**9)\ndef f(): return f()\nf()",
        ("done", "signal", "timeout"),
        0,
    ),
    "crash": ("import ctypes\nctypes.string_at(0)", ("signal",), 0),
    "close everything": ("import os\nos.closerange(0, 4096)\nos._exit(0)", ("done",), 0),
    "exit hooks": (
        "import atexit, os\natexit.register(lambda: os.system('sleep 600'))\nraise SystemExit(3)",
        ("done",),
        0,
    ),
}
SLOW = (
    "endless loop",
    "sleep",
    "loop in C",
    "loop that catches everything",
    "loop that ignores signals",
    "wait for input",
)


def judge(name: str, sandbox: Any, folder: str, port: int) -> str:
    """Run one attack; an empty string where it was stopped, else what went wrong."""
    from rorqual.verify.sandbox import Limits

    source, statuses, disk = ATTACKS[name]
    repo = str(Path(__file__).resolve().parents[2])
    for word, value in (("{folder}", folder), ("{port}", str(port)), ("{repo}", repo)):
        source = source.replace(word, value)
    limits = Limits(seconds=0.4, memory_mb=256, output_kb=64, disk_mb=disk)
    result = sandbox.run("rorqual.verify.player:program", {"source": source}, limits=limits)
    if "ESCAPED" in result.stdout:
        return f"it got out: {result.stdout[:200]}"
    if result.status not in statuses:
        return f"ended as {result.status} ({result.code}): {result.stderr[-300:]}"
    if result.wall_seconds > 6:
        return f"took {result.wall_seconds:.1f} s"
    if result.peak_bytes > 400 << 20:
        return f"took {result.peak_bytes >> 20} MB"
    if len(result.stdout) > 64 << 10 or len(result.stderr) > 64 << 10:
        return "its output was not cut"
    return ""


def alive(marker: str) -> list[int]:
    """Processes whose command line has the marker, zombies of such included nowhere."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdigit() and int(entry) != os.getpid():
            try:
                line = Path("/proc", entry, "cmdline").read_bytes()
            except OSError:
                continue
            if marker.encode() in line and b"zygote" in line and b"bwrap\0" not in line[:64]:
                found.append(int(entry))
    return found


def main(folder: str, port: int, rounds: int, kind: str) -> dict[str, Any]:
    """All attacks, `rounds` times; the folder's name marks our processes."""
    from rorqual.verify.sandbox import Sandbox

    faults, count = {}, 0
    with Sandbox(paths=[os.path.join(folder, "marker")], kind=kind) as sandbox:  # type: ignore[arg-type]
        sandbox.start()
        before = alive(folder)
        for _ in range(rounds):
            for name in ATTACKS:
                fault = judge(name, sandbox, folder, port)
                count += 1
                if fault:
                    faults[name] = fault
        left = sorted(set(alive(folder)) - set(before))
        features = sandbox.features
        server = sandbox._server.pid if sandbox._server else None
    deadline = time.monotonic() + 5
    while alive(folder) and time.monotonic() < deadline:
        time.sleep(0.01)
    return {
        "faults": faults,
        "count": count,
        "left": left,
        "after_close": alive(folder),
        "features": features,
        "server": server,
        "uid": os.getuid(),
    }


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "src"))
    print(json.dumps(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])))
