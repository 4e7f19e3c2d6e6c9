"""What the Linux kernel offers to confine a process, through ctypes: Landlock and seccomp filters. No dependency.

Landlock denies the file system but for named paths (and TCP, and signals to others where the kernel is new
enough); the seccomp filter lets through the system calls that plain Python needs and fails all others: there is
no fork, thread, exec, socket, kill, ptrace or mount behind it. Sources: linux/landlock.h, linux/seccomp.h,
linux/filter.h and the kernel's documentation of both.
"""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterable

PR_SET_PDEATHSIG, PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_GET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 4, 22, 21, 38
SECCOMP_MODE_FILTER = 2
ALLOW, KILL, ERRNO = 0x7FFF0000, 0x80000000, 0x00050000

# system call: number on x86_64 and on aarch64 (None: not there); the frequent ones first
CALLS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63),
    "write": (1, 64),
    "brk": (12, 214),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "futex": (202, 98),
    "clock_gettime": (228, 113),
    "close": (3, 57),
    "fstat": (5, 80),
    "stat": (4, None),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "lseek": (8, 62),
    "mprotect": (10, 226),
    "mremap": (25, 216),
    "madvise": (28, 233),
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "sigaltstack": (131, 132),
    "pread64": (17, 67),
    "readv": (19, 65),
    "writev": (20, 66),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "sched_yield": (24, 124),
    "sched_getaffinity": (204, 123),
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "getpid": (39, 172),
    "getppid": (110, 173),
    "gettid": (186, 178),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getpgrp": (111, None),
    "getpgid": (121, 155),
    "getsid": (124, 156),
    "getrandom": (318, 278),
    "getrusage": (98, 165),
    "times": (100, 153),
    "sysinfo": (99, 179),
    "uname": (63, 160),
    "umask": (95, 166),
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "getdents64": (217, 61),
    "open": (2, None),
    "openat": (257, 56),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "ftruncate": (77, 46),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "set_robust_list": (273, 99),
    "rseq": (334, 293),
    "set_tid_address": (218, 96),
    "getrlimit": (97, 163),
    "restart_syscall": (219, 128),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "arch_prctl": (158, None),
    "membarrier": (324, 283),
}
FCNTL, IOCTL, CLONE3 = (72, 25), (16, 29), (435, 435)
# F_DUPFD, F_GETFD, F_SETFD, F_GETFL, F_DUPFD_CLOEXEC. Not F_SETOWN and F_SETSIG: they send signals to others.
FCNTL_COMMANDS = (0, 1, 2, 3, 1030)
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same on every architecture
READ_FILE, READ_DIR = 1 << 2, 1 << 3
WRITE_FILE, REMOVE_FILE, MAKE_REG, TRUNCATE = 1 << 1, 1 << 5, 1 << 8, 1 << 14
FS_RIGHTS = {
    1: 13,
    2: 14,
    3: 15,
    4: 15,
    5: 16,
}  # how many file rights an ABI knows; the last holds from there on
NET_TCP = 0b11  # bind, connect
SCOPES = 0b11  # abstract sockets, signals


def libc() -> ctypes.CDLL:
    """The C library, with errno kept."""
    library = ctypes.CDLL(None, use_errno=True)
    library.syscall.restype = ctypes.c_long
    return library


def landlock_abi() -> int:
    """The version of Landlock that the running kernel has; 0: none."""
    if sys.platform != "linux":
        return 0
    found = int(libc().syscall(LANDLOCK_CREATE, None, ctypes.c_size_t(0), ctypes.c_uint32(1)))
    return max(found, 0)


def seccomp_supported() -> bool:
    """Whether this kernel takes filters and this processor's call numbers are known here."""
    if sys.platform != "linux" or platform.machine() not in AUDIT_ARCH:
        return False
    # A null filter is refused with EFAULT by kernels that know filters, with EINVAL by others.
    library = libc()
    library.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, None, 0, 0)
    return ctypes.get_errno() == errno.EFAULT


def ruleset(readable: Iterable[str], writable: Iterable[str] = ()) -> int:
    """A Landlock ruleset (an open descriptor) that denies all but reading below `readable` and plain files directly
    made, read, written and removed below `writable`. Paths that do not exist are left out."""
    abi, library = landlock_abi(), libc()
    fs = (1 << FS_RIGHTS.get(abi, FS_RIGHTS[5])) - 1
    attributes = struct.pack("QQQ", fs, NET_TCP if abi >= 4 else 0, SCOPES if abi >= 6 else 0)
    attributes = attributes[: 24 if abi >= 6 else 16 if abi >= 4 else 8]
    fd = int(
        library.syscall(LANDLOCK_CREATE, attributes, ctypes.c_size_t(len(attributes)), ctypes.c_uint32(0))
    )
    if fd < 0:
        raise OSError(ctypes.get_errno(), "landlock_create_ruleset")
    write = (READ_FILE | READ_DIR | WRITE_FILE | REMOVE_FILE | MAKE_REG | TRUNCATE) & fs
    for paths, rights in ((readable, READ_FILE | READ_DIR), (writable, write)):
        for path in paths:
            try:
                at = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except OSError:
                continue
            allowed = rights if os.path.isdir(path) else rights & (READ_FILE | WRITE_FILE)
            rule = struct.pack("=Qi", allowed, at)
            failed = library.syscall(
                LANDLOCK_ADD, ctypes.c_int(fd), ctypes.c_int(1), rule, ctypes.c_uint32(0)
            )
            os.close(at)
            if failed:
                raise OSError(ctypes.get_errno(), f"landlock_add_rule {path}")
    return fd


def filter_program() -> bytes:
    """The seccomp filter of this processor as BPF instructions."""
    column = 0 if platform.machine() == "x86_64" else 1

    def statement(code: int, k: int, jt: int = 0, jf: int = 0) -> bytes:
        return struct.pack("HBBI", code, jt, jf, k)

    load, equal, ret = 0x20, 0x15, 0x06
    numbers = [pair[column] for pair in CALLS.values() if pair[column] is not None]
    head = [
        statement(load, 4),  # seccomp_data.arch
        statement(equal, AUDIT_ARCH[platform.machine()], 1, 0),
        statement(ret, KILL),
        statement(load, 0),  # seccomp_data.nr
    ]
    tail = [
        statement(equal, IOCTL[column], 0, 1),
        statement(ret, ERRNO | errno.ENOTTY),
        statement(equal, CLONE3[column], 0, 1),
        statement(ret, ERRNO | errno.ENOSYS),
        statement(equal, FCNTL[column], 0, len(FCNTL_COMMANDS) + 1),
        statement(load, 24),  # the low half of the second argument (little endian)
        *(statement(equal, command, len(FCNTL_COMMANDS) - i, 0) for i, command in enumerate(FCNTL_COMMANDS)),
        statement(ret, ERRNO | errno.EPERM),
        statement(ret, ALLOW),
    ]
    body = [
        statement(equal, number or 0, len(numbers) - i - 1 + len(tail) - 1, 0)
        for i, number in enumerate(numbers)
    ]
    return b"".join([*head, *body, *tail])


def confine(ruleset_fd: int | None, program: bytes | None) -> None:
    """Restrict the calling process for good: no new privileges, then Landlock, then the filter. Raises OSError."""
    library = libc()
    if library.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0):
        raise OSError(ctypes.get_errno(), "no_new_privs")
    library.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)
    if ruleset_fd is not None:
        if library.syscall(LANDLOCK_RESTRICT, ctypes.c_int(ruleset_fd), ctypes.c_uint32(0)):
            raise OSError(ctypes.get_errno(), "landlock_restrict_self")
        os.close(ruleset_fd)
    if program is not None:
        code = ctypes.create_string_buffer(program, len(program))
        header = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(code))
        if library.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0):
            raise OSError(ctypes.get_errno(), "seccomp")
