"""The engines that can run a model, each behind the small `Backend` protocol of `generation.engine`.

A format's `RECORD` (`backends.record`) says which they are and what they take.
"""

import os
from importlib import import_module
from typing import cast

from phi_runtime.backends.record import EngineOptions, Record
from phi_runtime.errors import ContextError, UsageError
from phi_runtime.generation.engine import Backend
from phi_runtime.package.formats import FORMATS
from phi_runtime.package.open import Package
from phi_runtime.text.tokenizer import TokenizerLike

_MAX_THREADS = 512  # engines die of absurd numbers
# Tokens reserved where nobody said: the cache of a 128k model would take 48 GiB and more.
DEFAULT_CONTEXT = 4096


def record(format: str) -> Record:
    """What is known of a format's engines."""
    return cast(Record, import_module(f"phi_runtime.backends.{FORMATS[format]}").RECORD)


def choose_backend(package: Package, name: str | None) -> str:
    """The backend of that name, by default the first of the format. Raises UsageError."""
    engines = record(package.format).engines
    if name is not None and name not in engines:
        raise UsageError(f"backend {name!r} does not run {package.format} here; choose from {', '.join(engines)}")
    return name or next(iter(engines))


def choose_device(package: Package, backend: str, wanted: str) -> str:
    """`cpu` or `gpu`; for "auto" whichever the installed engine prefers here. Raises UsageError."""
    devices = record(package.format).devices(backend)
    if wanted not in ("auto", *devices):
        raise UsageError(
            f"device {wanted!r}: {backend}, as it is installed here, runs on {' and '.join(devices)} only; "
            'leave the device out, or say "auto"'
        )
    return devices[0] if wanted == "auto" else wanted


def open_backend(
    package: Package,
    name: str | None,
    context: int | None,
    threads: int | None,
    kv: str | None = None,
    device: str = "cpu",
    mapped: bool = False,
) -> Backend:
    """Open a model's artifact; mapped: see `EngineOptions`.

    Raises UsageError for a backend that does not run its format, a cache of a type that it does not have or a device
    that it cannot use, ContextError for a context beyond the model's, BundleError for a damaged artifact.
    """
    name = choose_backend(package, name)
    if context is not None and not 0 < context <= package.context:
        raise ContextError(f"context {context} is not between 1 and the model's {package.context}")
    if threads is not None and not 1 <= threads <= _MAX_THREADS:
        raise UsageError(f"threads {threads} is not between 1 and {_MAX_THREADS}")
    kinds = kv_types(package, name, kv)
    module, function = record(package.format).engines[name].split(":")
    opener = getattr(import_module(f"phi_runtime.backends.{module}"), function)
    tokens = context or min(package.context, DEFAULT_CONTEXT)
    device = choose_device(package, name, device)
    return cast(Backend, opener(package, EngineOptions(tokens, threads or cores(), kv or kinds[0], device, mapped)))


def own_tokenizer(package: Package, backend: Backend) -> TokenizerLike | None:
    """The tokenizer that the artifact holds, None for a format that holds none."""
    return record(package.format).tokenizer(backend)


def kv_types(package: Package, backend: str, wanted: str | None = None) -> tuple[str, ...]:
    """Types that the cache may have, the default first. Raises UsageError if the one that is wanted is none of them."""
    kinds = record(package.format).kv_types(package, backend)
    if wanted is not None and wanted not in kinds:
        way = "; export it with --calibrate for int8" if (package.format, wanted) == ("onnx", "int8") else ""
        raise UsageError(f"kv {wanted!r} is no type of cache for {backend} here; choose from {', '.join(kinds)}{way}")
    return kinds


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
