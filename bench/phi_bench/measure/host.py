"""The machine: what it is, and what else goes on while something is measured."""

import ctypes
import mmap
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from phi_bench.records import Conditions, Host, Software
from phi_runtime.backends import cores
from phi_runtime.planning.machine import machine

_SIMD = (
    "sse4_2",
    "avx",
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimd",
    "sve",
    "i8mm",
)
_PROBE_BYTES = 1 << 27  # a thread; more than caches hold
_COLD = 0.01  # a file with less than this share in the page cache is cold


def host() -> Host:
    """This machine, its read bandwidth measured."""
    m = machine()
    return Host(
        cpu=m.cpu,
        architecture=m.architecture,
        cores=m.cores,
        memory_bytes=m.memory_bytes,
        system=m.system,
        simd=_simd(),
        swap_bytes=psutil.swap_memory().total,
        read_bandwidth=max(bandwidth(m.cores) for _ in range(3)),
        governor=_read("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
    )


def software(packages: Iterable[str] = ()) -> Software:
    """phi-edge and its surroundings; packages that are not installed are left out."""
    m = machine()
    return Software(m.phi_edge, versions(packages), m.python, _revision())


def versions(packages: Iterable[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def bandwidth(threads: int, repeats: int = 3) -> float:
    """Bytes per second that threads together read from memory, the best of some tries."""
    blocks = [np.ones(_PROBE_BYTES // 4, np.float32) for _ in range(threads)]
    barrier = threading.Barrier(threads + 1)

    def read(block: np.ndarray) -> None:
        for _ in range(repeats):
            barrier.wait()
            block.dot(block)  # BLAS: one pass, without the interpreter's lock
            barrier.wait()

    readers = [threading.Thread(target=read, args=(b,), daemon=True) for b in blocks]
    for r in readers:
        r.start()
    best = float("inf")
    for _ in range(repeats):
        began = time.perf_counter()
        barrier.wait()
        barrier.wait()
        best = min(best, time.perf_counter() - began)
    for r in readers:
        r.join()
    return threads * _PROBE_BYTES / best


class Watch:
    """What goes on beside a run: made before it, asked after it."""

    def __init__(self, threads: int) -> None:
        self._bandwidth = bandwidth(min(threads, cores()), 3)
        self._cpu, self._swap, self._began = _cpu_seconds(), swapped(), time.monotonic()

    def conditions(self, own_seconds: float) -> Conditions:
        """own_seconds: processor time of the run itself."""
        now = _cpu_seconds()
        total = max((time.monotonic() - self._began) * psutil.cpu_count(), 1e-9)
        busy, steal = now[0] - self._cpu[0], now[1] - self._cpu[1]
        return Conditions(
            load_1m=os.getloadavg()[0],
            others=_share((busy - own_seconds) / total),
            steal=_share(steal / total),
            swapped=max(0, swapped() - self._swap),
            bandwidth=self._bandwidth,
            temperature_c=temperature(),
        )


def swapped() -> int:
    """Bytes that were moved to and from swap since the machine started."""
    s = psutil.swap_memory()
    return int(s.sin + s.sout)


def oom_kills() -> int:
    """How many processes the kernel ended for want of memory since it started; 0 where it does not say."""
    found = re.search(r"^oom_kill (\d+)$", _read("/proc/vmstat") or "", re.MULTILINE)
    return int(found[1]) if found else 0


def temperature() -> float | None:
    """Of the processor, degrees Celsius, where the system tells."""
    sensors: dict[str, list[Any]] = getattr(psutil, "sensors_temperatures", dict)()
    return max((float(t.current) for name in sensors for t in sensors[name] if t.current), default=None)


def energy_uj() -> int | None:
    """The processor's energy counter, microjoules, where it may be read (Intel and AMD, mostly by root)."""
    said = _read("/sys/class/powercap/intel-rapl:0/energy_uj")
    return int(said) if said else None


def drop_cached(files: list[Path]) -> bool:
    """Ask the system to forget the files' pages, and whether it did: whether a load will be cold."""
    if not hasattr(os, "posix_fadvise"):
        return False
    for path in files:
        with open(path, "rb") as f:
            os.fsync(f.fileno())  # pages that are not written yet stay
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return residency(files) < _COLD


def residency(files: list[Path]) -> float:
    """Share of the files' bytes that are in the page cache, by mincore; 1 where it cannot be asked."""
    if sys.platform != "linux":
        return 1.0
    libc = ctypes.CDLL(None, use_errno=True)
    pages = held = 0
    for path in files:
        size = path.stat().st_size
        if not size:
            continue
        with open(path, "rb") as f, mmap.mmap(f.fileno(), size, prot=mmap.PROT_READ) as m:
            count = -(-size // mmap.PAGESIZE)
            said = (ctypes.c_ubyte * count)()
            view = np.frombuffer(m, np.uint8)
            failed = libc.mincore(ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(size), said)
            del view  # the mapping can be closed
            if failed:
                return 1.0
            pages += count
            held += int((np.frombuffer(bytes(said), np.uint8) & 1).sum())
    return held / pages if pages else 1.0


def _cpu_seconds() -> tuple[float, float]:
    """Processor seconds of all programs since the start, and those that a virtual machine's host took."""
    t = psutil.cpu_times()
    busy = t.user + t.system + getattr(t, "nice", 0.0) + getattr(t, "irq", 0.0) + getattr(t, "softirq", 0.0)
    return busy, getattr(t, "steal", 0.0)


def _share(x: float) -> float:
    return min(1.0, max(0.0, x))


def _simd() -> tuple[str, ...]:
    found = re.search(r"^(?:flags|Features)\s*:(.*)$", _read("/proc/cpuinfo") or "", re.MULTILINE)
    flags = set(found[1].split()) if found else set()
    return tuple(name for name in _SIMD if name in flags)


def _revision() -> str | None:
    here = Path(__file__).parent
    try:
        done = subprocess.run(["git", "-C", here, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def _read(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None
