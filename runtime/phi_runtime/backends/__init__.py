"""The engines that can run a bundle, each behind the small `Backend` protocol of `engine`.

| name          | runs       | needs                |
|---------------|------------|----------------------|
| llama.cpp     | gguf       | `phi-edge[gguf]`     |
| onnxruntime   | onnx       | `phi-edge[onnx]`     |
| coreml        | coreml     | `phi-edge[coreml]`, macOS |
| mil-reference | coreml     | `phi-edge[coreml]`   |
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from phi_runtime.bundle import Manifest
from phi_runtime.engine import Backend
from phi_runtime.errors import ContextError, UsageError

_MAX_THREADS = 512  # engines die of absurd numbers
# Tokens reserved where nobody said: the cache of a 128k model would take 48 GiB and more.
DEFAULT_CONTEXT = 4096

Opener = Callable[[Path, Manifest, int, int], Backend]


def _llama_cpp(path: Path, manifest: Manifest, context: int, threads: int) -> Backend:
    from phi_runtime.backends.llama_cpp import LlamaCppBackend

    return LlamaCppBackend(path, context, threads)


def _onnxruntime(path: Path, manifest: Manifest, context: int, threads: int) -> Backend:
    from phi_runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(path, manifest.config().decoder(), context, threads)


def _coreml(path: Path, manifest: Manifest, context: int, threads: int) -> Backend:
    from phi_runtime.backends.coreml import CoreMLBackend, coremltools_functions, package_paths

    return CoreMLBackend(
        "coreml", [coremltools_functions(p) for p in package_paths(path)], manifest.config().decoder(), context
    )


def _mil_reference(path: Path, manifest: Manifest, context: int, threads: int) -> Backend:
    from phi_runtime.backends.coreml import CoreMLBackend, package_paths
    from phi_runtime.mil.interpreter import open_functions

    return CoreMLBackend(
        "mil-reference", [open_functions(p) for p in package_paths(path)], manifest.config().decoder(), context
    )


# Preferred first; the Core ML framework itself is found on macOS alone.
BACKENDS: dict[str, dict[str, Opener]] = {
    "gguf": {"llama.cpp": _llama_cpp},
    "onnx": {"onnxruntime": _onnxruntime},
    "coreml": (
        {"coreml": _coreml, "mil-reference": _mil_reference}
        if sys.platform == "darwin"
        else {"mil-reference": _mil_reference}
    ),
}


def open_backend(
    folder: Path, manifest: Manifest, name: str | None, context: int | None, threads: int | None
) -> Backend:
    """Open a bundle's artifact. Raises UsageError for a backend that does not run its format,
    ContextError for a context beyond the bundle's, BundleError for a damaged artifact.
    """
    openers = BACKENDS[manifest.format]
    if name is not None and name not in openers:
        raise UsageError(f"backend {name!r} does not run {manifest.format} here; choose from {', '.join(openers)}")
    if context is not None and not 0 < context <= manifest.context:
        raise ContextError(f"context {context} is not between 1 and the bundle's {manifest.context}")
    if threads is not None and not 1 <= threads <= _MAX_THREADS:
        raise UsageError(f"threads {threads} is not between 1 and {_MAX_THREADS}")
    opener = openers[name or next(iter(openers))]
    tokens = context or min(manifest.context, DEFAULT_CONTEXT)
    return opener(folder / manifest.artifact, manifest, tokens, threads or cores())


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
