"""The engines that can run a model, each behind the small `Backend` protocol of `engine`.

| name          | runs       | needs                |
|---------------|------------|----------------------|
| llama.cpp     | gguf       | `phi-edge[gguf]`     |
| ik_llama.cpp  | gguf       | `phi-edge[gguf-fast]` |
| onnxruntime   | onnx       | `phi-edge[onnx]`     |
| coreml        | coreml     | `phi-edge[coreml]`, macOS |
| mil-reference | coreml     | `phi-edge[coreml]`   |
"""

import os
import sys
from collections.abc import Callable

from phi_runtime.backends.llama_cpp import KV_TYPES
from phi_runtime.errors import ContextError, UsageError
from phi_runtime.generation.engine import Backend
from phi_runtime.package.open import Package
from phi_runtime.text.tokenizer import Codec

_MAX_THREADS = 512  # engines die of absurd numbers
# Tokens reserved where nobody said: the cache of a 128k model would take 48 GiB and more.
DEFAULT_CONTEXT = 4096

Opener = Callable[[Package, int, int, str], Backend]


def _llama_cpp(package: Package, context: int, threads: int, kv: str) -> Backend:
    from phi_runtime.backends.llama_cpp import LlamaCppBackend

    return LlamaCppBackend(package.path, context, threads, kv, package.shape.crossover)


def _ik_llama_cpp(package: Package, context: int, threads: int, kv: str) -> Backend:
    from phi_runtime.backends.ik_llama_cpp import IkLlamaCppBackend

    return IkLlamaCppBackend(package.path, context, threads, kv, package.shape.crossover)


def _onnxruntime(package: Package, context: int, threads: int, kv: str) -> Backend:
    from phi_runtime.backends.onnxruntime import OnnxRuntimeBackend

    return OnnxRuntimeBackend(package.path, package.shape, context, threads, kv)


def _coreml(package: Package, context: int, threads: int, kv: str) -> Backend:
    from phi_runtime.backends.coreml import CoreMLBackend, coremltools_functions, package_paths

    functions = [coremltools_functions(p) for p in package_paths(package.path)]
    return CoreMLBackend("coreml", functions, package.shape, context)


def _mil_reference(package: Package, context: int, threads: int, kv: str) -> Backend:
    from phi_runtime.backends.coreml import CoreMLBackend, package_paths
    from phi_runtime.backends.mil.interpreter import open_functions

    functions = [open_functions(p) for p in package_paths(package.path)]
    return CoreMLBackend("mil-reference", functions, package.shape, context)


# Those that have to be asked for.
ON_REQUEST = ("ik_llama.cpp",)
# Preferred first; the Core ML framework itself is found on macOS alone.
BACKENDS: dict[str, dict[str, Opener]] = {
    "gguf": {"llama.cpp": _llama_cpp, "ik_llama.cpp": _ik_llama_cpp},
    "onnx": {"onnxruntime": _onnxruntime},
    "coreml": (
        {"coreml": _coreml, "mil-reference": _mil_reference}
        if sys.platform == "darwin"
        else {"mil-reference": _mil_reference}
    ),
}


def choose_backend(package: Package, name: str | None) -> str:
    """The backend of that name, by default the first of the format. Raises UsageError."""
    openers = BACKENDS[package.format]
    if name is not None and name not in openers:
        raise UsageError(f"backend {name!r} does not run {package.format} here; choose from {', '.join(openers)}")
    return name or next(iter(openers))


def open_backend(
    package: Package, name: str | None, context: int | None, threads: int | None, kv: str | None = None
) -> Backend:
    """Open a model's artifact. Raises UsageError for a backend that does not run its format or a cache of a type that
    it does not have, ContextError for a context beyond the model's, BundleError for a damaged artifact.
    """
    name = choose_backend(package, name)
    if context is not None and not 0 < context <= package.context:
        raise ContextError(f"context {context} is not between 1 and the model's {package.context}")
    if threads is not None and not 1 <= threads <= _MAX_THREADS:
        raise UsageError(f"threads {threads} is not between 1 and {_MAX_THREADS}")
    kinds = kv_types(package, name, kv)
    opener = BACKENDS[package.format][name]
    tokens = context or min(package.context, DEFAULT_CONTEXT)
    return opener(package, tokens, threads or cores(), kv or kinds[0])


def own_tokenizer(backend: Backend) -> Codec | None:
    """The tokenizer that the artifact holds, None for a format that holds none."""
    from phi_runtime.backends.llama_cpp import LlamaCppBackend, LlamaCppTokenizer

    return LlamaCppTokenizer(backend) if isinstance(backend, LlamaCppBackend) else None


def kv_types(package: Package, backend: str, wanted: str | None = None) -> tuple[str, ...]:
    """Types that the cache may have, the default first. Raises UsageError if the one that is wanted is none of them."""
    options = package.manifest.options if package.manifest is not None else {}
    own = "f16" if package.format == "coreml" or options.get("profile") == "fp16" else "f32"
    kinds: tuple[str, ...] = (own, "int8") if options.get("int8_kv") else (own,)
    if package.format == "gguf":
        kinds = tuple(KV_TYPES) if backend == "llama.cpp" else ("f16",)
    if wanted is not None and wanted not in kinds:
        way = "; export it with --calibrate for int8" if (package.format, wanted) == ("onnx", "int8") else ""
        raise UsageError(f"kv {wanted!r} is no type of cache for {backend} here; choose from {', '.join(kinds)}{way}")
    return kinds


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
