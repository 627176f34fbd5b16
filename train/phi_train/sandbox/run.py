"""`Sandbox`: run a function that a model wrote against its tests."""

import json
import os
import platform
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from phi_runtime.errors import PhiError
from phi_train.sandbox.confine import SYSTEMS, in_namespaces, landlock_version


class SandboxError(PhiError):
    """There is no sandbox on this system, or it ended."""


@dataclass(frozen=True)
class Job:
    """A program that defines `entry`, and `tests` that define `check(candidate)`, which raises where it is wrong.

    `prompt` is run before the tests, so that they may use other functions that the task gives.
    """

    program: str
    entry: str
    tests: str
    prompt: str = ""


@dataclass(frozen=True)
class Limits:
    """seconds: of the clock, about as many of the processor. memory: bytes of address space. output: bytes printed."""

    seconds: float = 10.0
    memory: int = 1 << 30
    output: int = 1 << 20


@dataclass(frozen=True)
class Outcome:
    """passed: every test held. failed: a test did not. error: the program does not load, raised or ended itself."""

    kind: Literal["passed", "failed", "error", "timeout", "memory", "output"]
    message: str
    seconds: float


# Fails where anything that a program must not do succeeds.
_CONFINED = Job(
    """
import os, socket

def tries():
    done = []
    for name, attempt in (
        ("reads a file", lambda: open("/etc/passwd").read()), ("writes a file", lambda: open("/tmp/x", "w")),
        ("lists a folder", lambda: os.listdir("/etc")), ("opens a socket", socket.socket), ("forks", os.fork),
        ("sends a signal", lambda: os.kill(os.getppid(), 0)),
        ("runs a program", lambda: os.execv("/bin/true", ["true"])),
    ):
        try:
            attempt()
            done.append(name)
        except OSError:
            pass
    return done
""",
    "tries",
    "def check(candidate):\n    done = candidate()\n    assert done == [], ', '.join(done)\n",
)


class Sandbox:
    """A worker that runs programs, one at a time; threads each want their own. Closed by `close` or `with`.

    Raises SandboxError where the kernel has no Landlock (Linux 5.13 or later) and there is no bubblewrap, or where a
    first program finds that it can do what it must not: nothing runs without a sandbox.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.limits = limits or Limits()
        self._worker = _start()
        try:
            found = self.run(_CONFINED)
        except SandboxError:
            self.close()
            raise SandboxError(
                "the sandbox's worker did not start; with bubblewrap it needs user namespaces "
                "(sysctl kernel.unprivileged_userns_clone=1)"
            ) from None
        if found.kind != "passed":
            self.close()
            raise SandboxError(f"this system does not confine programs ({found.message}); use another machine")

    def run(self, job: Job) -> Outcome:
        """What came of it. Raises SandboxError where the worker ended."""
        said = {**job.__dict__, **self.limits.__dict__}
        assert self._worker.stdin is not None and self._worker.stdout is not None
        try:
            self._worker.stdin.write(json.dumps(said).encode() + b"\n")
            self._worker.stdin.flush()
            line = self._worker.stdout.readline()
        except BrokenPipeError:
            line = b""
        if not line:
            raise SandboxError("the sandbox's worker ended; is there enough memory? Run it again")
        return Outcome(**json.loads(line))

    def close(self) -> None:
        """End the worker."""
        assert self._worker.stdin is not None and self._worker.stdout is not None
        with suppress(BrokenPipeError):  # it may have ended
            self._worker.stdin.close()
        self._worker.wait()
        self._worker.stdout.close()

    def __enter__(self) -> "Sandbox":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def run_all(jobs: Iterable[Job], limits: Limits | None = None, workers: int | None = None) -> Iterator[Outcome]:
    """Outcomes in the order of the jobs, by as many workers as there are cores."""
    held, all_of_them = threading.local(), []

    def one(job: Job) -> Outcome:
        if not hasattr(held, "sandbox"):
            held.sandbox = Sandbox(limits)
            all_of_them.append(held.sandbox)
        sandbox: Sandbox = held.sandbox
        return sandbox.run(job)

    try:
        with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
            yield from pool.map(one, jobs)
    finally:
        for sandbox in all_of_them:
            sandbox.close()


def _start() -> subprocess.Popen[bytes]:
    # Not this process's modules, environment or folder: the worker is small, and forks are of it.
    home = Path(__file__).resolve().parents[2]
    code = f"import sys; sys.path.append({str(home)!r}); from phi_train.sandbox.worker import main; main()"
    command = [sys.executable, "-s", "-S", "-P", "-c", code]
    if landlock_version() == 0:
        bubblewrap = shutil.which("bwrap")
        if platform.machine() not in SYSTEMS or sys.platform != "linux" or bubblewrap is None:
            raise SandboxError(
                "a model's programs run on Linux, x86-64 or ARM, with Landlock (5.13 or later) or bubblewrap; install "
                "bubblewrap, or use another machine"
            )
        needed = {sys.executable, f"{home}/phi_train/__init__.py", f"{home}/phi_train/sandbox"}
        command = in_namespaces(bubblewrap, [*command, "bare"], needed)
    return subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd="/",
        env={"PYTHONHASHSEED": "0", "LC_ALL": "C.UTF-8"},
    )
