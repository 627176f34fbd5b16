"""How much memory a model will take, before it is loaded: weights, cache, buffers and the process around them.

What the arithmetic leaves out was measured, and is held to measurements by `tests/runtime/test_memory.py`.
"""

import os
import re
from dataclasses import dataclass, replace
from pathlib import Path

from phi_runtime.backends import DEFAULT_CONTEXT, choose_backend, kv_types, record
from phi_runtime.errors import ContextError, MemoryPlanError, UsageError
from phi_runtime.package.open import Package, open_package
from phi_runtime.planning.available import available
from phi_runtime.planning.speed import measured_speeds

# What a process may take, bytes. Phones: what iOS allows an app of a device with 6 GB, without and with the entitlement
# com.apple.developer.kernel.increased-memory-limit. Laptops: three quarters of what is built in.
DEVICES = {
    "iphone-14-pro": 2_867_000_000,
    "iphone-14-pro-increased": 4_000_000_000,
    "laptop-8gb": 6_000_000_000,
    "laptop-16gb": 12_000_000_000,
}
_CONTEXTS = (32768, 16384, 8192, 4096, 3072, 2048, 1024, 512)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of a model on one device: the peak is the sum of the parts. `limit` is what it may take.

    tokens_per_second: predicted of this machine, with all cores and little behind a token; None where
    `phi-export calibrate-speed` never measured it, or not all of the model's types.
    """

    device: str
    context: int
    kv: str
    weights: int
    cache: int
    buffers: int
    process: int
    limit: int
    tokens_per_second: float | None = None

    @property
    def peak(self) -> int:
        """The most that is resident at once."""
        return self.weights + self.cache + self.buffers + self.process

    @property
    def fits(self) -> bool:
        """Whether it stays under the limit."""
        return self.peak <= self.limit

    def arithmetic(self) -> str:
        """The sum in one line, GB being 10^9 bytes."""
        parts = {"weights": self.weights, f"cache of {self.context} tokens in {self.kv}": self.cache}
        parts |= {"buffers": self.buffers, "process": self.process}
        said = " + ".join(f"{size / 1e9:.3f} ({name})" for name, size in parts.items())
        outcome = "fits" if self.fits else "does not fit"
        return f"{said} = {self.peak / 1e9:.3f} GB; {self.limit / 1e9:.3f} GB allowed: {outcome}"


def plan(
    path: str | Path,
    device: str | None = None,
    context: int | None = None,
    memory: int | str | None = None,
    kv: str | None = None,
    backend: str | None = None,
) -> MemoryPlan:
    """Predict what `load(path, …)` will take, on this machine or a named device (`DEVICES`).

    What is not given is chosen: the largest context that fits, in the most exact cache that allows 4,096 tokens.
    Raises MemoryPlanError, with the arithmetic, where even the smallest does not fit.
    """
    return plan_package(open_package(path), device, context, memory, kv, backend)


def plan_package(
    package: Package,
    device: str | None = None,
    context: int | None = None,
    memory: int | str | None = None,
    kv: str | None = None,
    backend: str | None = None,
) -> MemoryPlan:
    """As `plan`, of what was opened."""
    if device is not None and device not in DEVICES:
        raise UsageError(f"no device {device!r}; choose from {', '.join(DEVICES)}, or leave it out for this machine")
    engine = choose_backend(package, backend)
    limit = _bytes(memory) if memory is not None else DEVICES[device] if device is not None else available()
    kinds = kv_types(package, engine, kv)
    if context is not None and not 0 < context <= package.context:
        raise ContextError(f"context {context} is not between 1 and the model's {package.context}")
    most = min(package.context, DEFAULT_CONTEXT)
    contexts = [context] if context is not None else [most, *(c for c in _CONTEXTS if c < most)]
    best = None
    for tokens in contexts:  # rather a coarser cache than a shorter context; f16, q8_0 and 4.5 bits are worth a choice
        for kind in [kv] if kv is not None else [k for k in kinds if k in ("f32", "f16", "int8", "q8_0", "iq4_nl")]:
            found = predict(package, device or "this machine", tokens, kind, limit)
            if found.fits:
                return found if device is not None else replace(found, tokens_per_second=_speed(package, engine))
            best = found if best is None or found.peak < best.peak else best
    assert best is not None
    raise MemoryPlanError(f"{package.path}: {best.arithmetic()}; export it smaller, or allow more")


def predict(package: Package, device: str, context: int, kv: str, limit: int) -> MemoryPlan:
    """The arithmetic for one context and type of cache."""
    known = record(package.format)
    cache, buffers = known.memory(package, context, kv)
    return MemoryPlan(device, context, kv, package.weights, cache, buffers, known.process, limit)


def _speed(package: Package, backend: str) -> float | None:
    speeds = measured_speeds(backend) if package.matrices else None
    milliseconds = speeds.milliseconds(list(package.matrices)) if speeds is not None else None
    return None if not milliseconds else 1000 / milliseconds


def _bytes(size: int | str) -> int:
    if isinstance(size, int):
        if size < 1:
            raise UsageError(f"memory {size} is no number of bytes")
        return size
    return parse_size(size)


def parse_size(text: str) -> int:
    """Bytes of a size with its unit: MB and GB are powers of ten, MiB and GiB powers of two. Raises UsageError."""
    units = {"MB": 10**6, "GB": 10**9, "MiB": 2**20, "GiB": 2**30}
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)\s*", text)
    if found is None or found[2] not in units or not 0 < float(found[1]) < 1e9:
        raise UsageError(
            f"--memory {text!r}: give a number and its unit, {', '.join(units)}; for example 1.8GB or 1.8GiB"
        )
    return int(float(found[1]) * units[found[2]])


def resident() -> int:
    """Bytes that this process has in memory now; 0 where the system does not say."""
    info = Path("/proc/self/statm")
    return int(info.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if info.is_file() else 0
