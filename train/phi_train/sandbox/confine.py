"""Take from this process what a model's program does not need: Linux's Landlock, seccomp and limits, by ctypes.

After `confine` the process can read Python's own files and nothing else, write to what it has open, start threads,
and compute. It has no network, no other process, no capability, and cannot get any of it back. Landlock (kernel 5.13
or later) and seccomp need no rights of the caller; where there is no Landlock, bubblewrap's namespaces hide the files.
Sources: the kernel's userspace-api/landlock.rst and seccomp_filter.rst, the headers linux/landlock.h, linux/seccomp.h,
asm/unistd.h, bubblewrap's manual bwrap(1).
"""

import ctypes
import os
import platform
import resource
import struct
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP = 38, 22, 4, 24
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # the same numbers on all processors
_READ_FILE, _READ_DIR = 1 << 2, 1 << 3
_FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15, 5: 16}  # by version of Landlock: how many bits it knows
_O_PATH = 0o10000000

# By name: (x86_64, aarch64); None where the processor has no such call. Everything else fails with EPERM.
_CALLS: dict[str, tuple[int | None, int | None]] = {
    "read": (0, 63), "write": (1, 64), "close": (3, 57), "stat": (4, None), "fstat": (5, 80), "lstat": (6, None),
    "poll": (7, None), "lseek": (8, 62), "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "brk": (12, 214),
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "ioctl": (16, 29),
    "pread64": (17, 67), "readv": (19, 65), "writev": (20, 66), "access": (21, None), "select": (23, None),
    "sched_yield": (24, 124), "mremap": (25, 216), "madvise": (28, 233), "dup": (32, 23), "dup2": (33, None),
    "nanosleep": (35, 101), "getpid": (39, 172), "exit": (60, 93), "uname": (63, 160), "fcntl": (72, 25),
    "getcwd": (79, 17), "readlink": (89, None), "gettimeofday": (96, 169), "getrlimit": (97, None),
    "getrusage": (98, 165), "sysinfo": (99, 179), "times": (100, 153), "getuid": (102, 174), "getgid": (104, 176),
    "geteuid": (107, 175), "getegid": (108, 177), "getppid": (110, 173), "sigaltstack": (131, 132),
    "gettid": (186, 178),
    "time": (201, None), "futex": (202, 98), "sched_getaffinity": (204, 123), "getdents64": (217, 61),
    "set_tid_address": (218, 96), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "clock_nanosleep": (230, 115), "exit_group": (231, 94), "openat": (257, 56), "newfstatat": (262, 79),
    "readlinkat": (267, 78), "faccessat": (269, 48), "pselect6": (270, 72), "ppoll": (271, 73),
    "set_robust_list": (273, 99), "get_robust_list": (274, 100), "dup3": (292, 24), "pipe2": (293, 59),
    "getrandom": (318, 278), "membarrier": (324, 283), "statx": (332, 291), "rseq": (334, 293),
    "faccessat2": (439, 439), "open": (2, None),
}  # fmt: skip
_CLONE, _CLONE3 = (56, 220), (435, 435)
_CLONE_THREAD = 0x10000
SYSTEMS = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # processors: AUDIT_ARCH_*, column of _CALLS

_LOAD, _JUMP_EQUAL, _JUMP_SET, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000
_EPERM, _ENOSYS = 1, 38


def landlock_version() -> int:
    """The version of Landlock in this kernel, 0 for none."""
    if sys.platform != "linux" or platform.machine() not in SYSTEMS:
        return 0
    return max(0, int(ctypes.CDLL(None, use_errno=True).syscall(_CREATE_RULESET, None, 0, 1)))


def readable() -> list[str]:
    """What a program may read: Python's library and the system's."""
    paths = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), f"{sys.base_prefix}/lib"}
    paths |= {"/lib", "/lib64", "/usr/lib", "/usr/lib64", "/usr/share/zoneinfo", "/dev/null", "/dev/urandom"}
    return sorted(p for p in paths if Path(p).exists())


def confine(paths: Iterable[str] | None, memory: int, seconds: int) -> None:
    """For good. `memory`: bytes of address space; `seconds` of the processor. Raises OSError if a part is refused.

    paths: what can be read; None where this process sees no other files already (`in_namespaces`).
    """
    libc = ctypes.CDLL(None, use_errno=True)
    for kind, most in (
        (resource.RLIMIT_CORE, 0), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_AS, memory), (resource.RLIMIT_CPU, seconds + 1),
    ):  # fmt: skip
        resource.setrlimit(kind, (most, most))
    _drop_capabilities(libc)
    _ask(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    _ask(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "dumpable")
    if paths is not None:
        _restrict_files(libc, paths)
    _restrict_calls(libc)


def in_namespaces(bubblewrap: str, command: list[str], readable_too: Iterable[str]) -> list[str]:
    """The command, run where only Python's and the system's libraries and `readable_too` exist, without Landlock.

    bubblewrap: the program `bwrap`, which needs user namespaces of the kernel, or root.
    """
    shown: list[str] = []
    for path in sorted({*readable(), *readable_too}):
        shown += ["--dev-bind" if path.startswith("/dev/") else "--ro-bind", path, path]
    apart = ["--unshare-all", "--die-with-parent", "--new-session", "--cap-drop", "ALL", "--chdir", "/"]
    return [bubblewrap, *apart, *shown, "--remount-ro", "/", "--", *command]


def _ask(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), f"{what} was refused")
    return result


def _drop_capabilities(libc: ctypes.CDLL) -> None:
    for capability in range(64):
        if libc.prctl(_PR_CAPBSET_DROP, capability, 0, 0, 0) < 0:
            break  # beyond the last one, or not root: then there are none
    header = struct.pack("=Ii", 0x20080522, 0)
    _ask(libc.capset(header, bytes(24)), "dropping capabilities")


def _restrict_files(libc: ctypes.CDLL, paths: Iterable[str]) -> None:
    version = landlock_version()
    if version == 0:
        raise OSError("this kernel has no Landlock")
    files = (1 << _FILE_RIGHTS.get(version, 16)) - 1
    rules = struct.pack("=Q", files)
    if version >= 4:
        rules += struct.pack("=Q", 0b11)  # to bind and to connect
    if version >= 6:
        rules += struct.pack("=Q", 0b11)  # signals and abstract sockets to processes outside
    ruleset = _ask(libc.syscall(_CREATE_RULESET, rules, len(rules), 0), "Landlock")
    for path in paths:
        place = os.open(path, _O_PATH | os.O_CLOEXEC)
        allowed = _READ_FILE | (_READ_DIR if Path(path).is_dir() else 0)
        _ask(libc.syscall(_ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, place), 0), f"reading {path}")
        os.close(place)
    _ask(libc.syscall(_RESTRICT_SELF, ruleset, 0), "Landlock")
    os.close(ruleset)


def _restrict_calls(libc: ctypes.CDLL) -> None:
    architecture, column = SYSTEMS[platform.machine()]
    code = [
        (_LOAD, 0, 0, 4), (_JUMP_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),
        (_JUMP_EQUAL, 0, 1, _CLONE3[column]), (_RETURN, 0, 0, _ERRNO | _ENOSYS),  # glibc then asks for clone
        (_JUMP_EQUAL, 0, 4, _CLONE[column]),
        (_LOAD, 0, 0, 16), (_JUMP_SET, 0, 1, _CLONE_THREAD), (_RETURN, 0, 0, _ALLOW), (_RETURN, 0, 0, _ERRNO | _EPERM),
    ]  # fmt: skip
    for number in (found for numbers in _CALLS.values() if (found := numbers[column]) is not None):
        code += [(_JUMP_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    code.append((_RETURN, 0, 0, _ERRNO | _EPERM))
    program = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in code))
    described = struct.pack("@HP", len(code), ctypes.addressof(program))
    _ask(libc.prctl(_PR_SET_SECCOMP, 2, described, 0, 0), "seccomp")
