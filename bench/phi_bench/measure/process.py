"""Start a measuring process, watch its memory from outside, and say what became of it."""

import contextlib
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast, get_args

import msgspec
import psutil

from phi_bench.adapters import adapter
from phi_bench.measure import host
from phi_bench.measure.job import Event, Job
from phi_bench.peers.environments import environment_of, python_of
from phi_bench.records import Checkpoints, Failure, Memory, Reason
from phi_runtime.contract import decode
from phi_runtime.errors import BenchmarkError

_WORKER = ("-m", "phi_bench.measure.worker")
_GRACE_S = 5.0  # a process that has said its last may take to end
_SAMPLE_S = 0.05
_FAMILY_S = 0.5  # how often new children are looked for
_SERIES = 200  # points of the memory over time that are kept
_PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Outcome:
    """What a process said and took. result: None where it failed. cpu_s: of the process, its children and us."""

    result: Event | None
    failure: Failure | None
    memory: Checkpoints | None
    cpu_s: float


def measure(
    job: Job, timeout_s: float, memory_limit: int | None = None, program: tuple[str, ...] | None = None
) -> Outcome:
    """Do a job in a process of its own; it is ended after `timeout_s`, and where it takes more than `memory_limit`.

    program: what speaks the worker's protocol, None for the worker in its adapter's environment; the number of the file
    descriptor for its events is its last argument.
    """
    variables = None
    if program is None:
        try:
            program, variables = _worker(job.adapter)
        except BenchmarkError as e:
            return Outcome(None, Failure("not installed", str(e)), None, 0.0)
    read_fd, write_fd = os.pipe()
    cpu_before = _own_and_children_s()
    killed_before = host.oom_kills()
    with tempfile.TemporaryFile() as said:
        command = [*program, str(write_fd)]
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            pass_fds=(write_fd,),
            start_new_session=True,
            env=variables,
        )
        os.close(write_fd)
        watch, grace_s = _Watch(process.pid), 0.0
        try:
            result, ended = _converse(process, read_fd, job, watch, timeout_s, memory_limit)
            grace_s = 0 if ended else _GRACE_S
        finally:
            _end(process, grace_s)
            os.close(read_fd)
        failure = _failure(process.returncode, result, ended, _last_line(said), host.oom_kills() > killed_before)
    good = failure is None and result is not None
    cpu_s = _own_and_children_s() - cpu_before
    return Outcome(result if good else None, failure, watch.checkpoints(), cpu_s)


def _worker(adapter_name: str) -> tuple[tuple[str, ...], dict[str, str] | None]:
    """The command of the worker, and its variables where its environment is not ours. Raises BenchmarkError."""
    name = adapter(adapter_name).environment
    if name is None:
        return (sys.executable, *_WORKER), None
    return (str(python_of(name)), *_WORKER), environment_of(name)


def _converse(
    process: subprocess.Popen[bytes],
    fd: int,
    job: Job,
    watch: "_Watch",
    timeout_s: float,
    memory_limit: int | None,
) -> tuple[Event | None, str]:
    """The last event, and why we ended the process ourselves ("" where it ended by itself)."""
    stdin = cast(IO[bytes], process.stdin)
    with contextlib.suppress(BrokenPipeError):
        stdin.write(msgspec.json.encode(job) + b"\n")
        stdin.flush()
    deadline, pending, result = time.monotonic() + timeout_s, b"", None
    while True:
        ready, _, _ = select.select([fd], [], [], _SAMPLE_S)
        watch.sample()
        if memory_limit is not None and watch.peak > memory_limit:
            return None, f"out of memory:it passed the limit of {memory_limit:,} bytes"
        if time.monotonic() > deadline:
            return None, f"timed out:after {timeout_s:.0f} s"
        if not ready:
            continue
        piece = os.read(fd, 1 << 16)
        if not piece:
            return result, ""
        pending += piece
        *lines, pending = pending.split(b"\n")
        for line in lines:
            try:
                event = decode(line, Event)
            except ValueError as e:
                event = Event("failure", reason="bad output", detail=str(e))
            if event.kind in ("result", "failure"):
                result = event
                continue
            watch.look(event.kind)
            with contextlib.suppress(BrokenPipeError):
                stdin.write(b"\n")
                stdin.flush()


def _end(process: subprocess.Popen[bytes], grace_s: float) -> None:
    """Wait a moment for a process that is done; end it and its children."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace_s)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin is not None:
        with contextlib.suppress(OSError):
            process.stdin.close()
    process.wait()


def _failure(status: int, event: Event | None, ended: str, line: str, kernel_killed: bool) -> Failure | None:
    if ended:
        reason, _, detail = ended.partition(":")
        return Failure(cast(Reason, reason), detail, None, "SIGKILL")
    if event is not None and event.kind == "failure":
        reason = event.reason if event.reason in get_args(Reason) else "crashed"
        return Failure(cast(Reason, reason), event.detail, status if status > 0 else None)
    if event is not None:
        return None
    if status < 0:
        name = signal.Signals(-status).name
        if kernel_killed and name == "SIGKILL":
            return Failure("out of memory", "the kernel ended it (oom_kill)", None, name)
        return Failure("crashed", line or f"ended by {name}", None, name)
    reason = "out of memory" if "bad_alloc" in line or "MemoryError" in line else "crashed"
    return Failure(cast(Reason, reason), line or "it said nothing", status)


def _last_line(said: IO[bytes]) -> str:
    said.seek(max(0, said.seek(0, os.SEEK_END) - 4096))
    lines = said.read().decode("utf-8", "replace").strip().splitlines()
    return lines[-1].strip()[:300] if lines else ""


class _Watch:
    """The memory of a process and its children, seen from outside."""

    def __init__(self, pid: int) -> None:
        self._root = psutil.Process(pid)
        self._family = [self._root]
        self._looked, self._began = 0.0, time.monotonic()
        self._points: dict[str, Memory] = {}
        self._series: list[tuple[int, int]] = []
        self.peak = 0

    def sample(self) -> None:
        """Add up what is resident now."""
        now = time.monotonic()
        if now - self._looked > _FAMILY_S:
            self._looked = now
            with contextlib.suppress(psutil.Error):
                self._family = [self._root, *self._root.children(recursive=True)]
        rss = sum(map(_rss, self._family))
        self.peak = max(self.peak, rss)
        self._series.append((int(1000 * (now - self._began)), rss))

    def look(self, moment: str) -> None:
        """Read all figures of a moment at which the process waits."""
        family = self._family
        with contextlib.suppress(psutil.Error):
            family = [self._root, *self._root.children(recursive=True)]
        found = [m for p in family if (m := _memory(p)) is not None]
        self._points[moment] = Memory(
            sum(m.rss for m in found),
            _sum([m.pss for m in found]),
            _sum([m.swap for m in found]),
        )
        self.peak = max(self.peak, self._points[moment].rss)
        if len(family) == 1 and moment in ("generated", "unloaded"):
            self.peak = max(self.peak, _high_water(self._root.pid))

    def checkpoints(self) -> Checkpoints | None:
        """What was seen."""
        if not self.peak:
            return None
        step = -(-len(self._series) // _SERIES)
        parts = [self._series[i : i + step] for i in range(0, len(self._series), step)] if step else []
        series = tuple((part[0][0], max(rss for _, rss in part)) for part in parts)
        return Checkpoints(self.peak, series=series, **self._points)


def _memory(p: psutil.Process) -> Memory | None:
    try:
        m = p.memory_full_info()
    except psutil.Error:
        return None
    return Memory(m.rss, getattr(m, "pss", None), getattr(m, "swap", None))


def _rss(p: psutil.Process) -> int:
    try:
        if sys.platform == "linux":
            return int(Path(f"/proc/{p.pid}/statm").read_text().split()[1]) * _PAGE
        return int(p.memory_info().rss)
    except (psutil.Error, OSError, IndexError):
        return 0


def _high_water(pid: int) -> int:
    """The system's own mark of the most that was resident; 0 where it keeps none."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def _own_and_children_s() -> float:
    """Processor seconds of this process and of all that it has waited for."""
    t = os.times()
    return t.user + t.system + t.children_user + t.children_system


def _sum(values: list[int | None]) -> int | None:
    known = [v for v in values if v is not None]
    return sum(known) if known and len(known) == len(values) else None
