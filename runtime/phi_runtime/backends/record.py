"""The record of a format's engines: how they are opened, their devices, memory and KV cache types."""

from collections.abc import Callable
from dataclasses import dataclass

from phi_runtime.generation.engine import CHUNK, Backend
from phi_runtime.package.open import Package
from phi_runtime.text.tokenizer import TokenizerLike


@dataclass(frozen=True)
class EngineOptions:
    """How a package is opened. context: tokens to reserve. kv: type of the cache. device: `cpu` or `gpu`.

    mapped: weights stay in the mapped file instead of being laid out anew for the processor: slower, but the system can
    take their pages back.
    """

    context: int
    threads: int
    kv: str
    device: str = "cpu"
    mapped: bool = False


@dataclass(frozen=True)
class Record:
    """What runs a format, and what that takes.

    engines: by name, preferred first, the function that opens a package, as `module:function` of
    `phi_runtime.backends`; it takes the package and `EngineOptions`. on_request: those of them that are never chosen by
    themselves. devices: what an engine, as it is installed, can run on here, preferred first. module, extra: what has
    to be importable, and the extra of phi-edge that brings it. process: bytes of Python, NumPy, the tokenizer and the
    engine's own code before any model; measured on Linux, x86-64. kv_types: types that the cache may have, the default
    first, by package and engine. memory: bytes of the cache and of buffers, by package, context and type of the cache.
    native: whether the engine runs here as on the devices that it is for; one that does not is slow, and its speed says
    nothing. tokenizer: what an artifact brings of its own.
    """

    engines: dict[str, str]
    module: str
    extra: str
    process: int
    kv_types: Callable[[Package, str], tuple[str, ...]]
    memory: Callable[[Package, int, str], tuple[int, int]]
    on_request: tuple[str, ...] = ()
    devices: Callable[[str], tuple[str, ...]] = lambda _: ("cpu",)
    native: bool = True
    tokenizer: Callable[[Backend], TokenizerLike | None] = lambda _: None


def kv_numbers(package: Package) -> int:
    """Numbers that the cache holds per token."""
    shape = package.shape
    return 2 * shape.layers * shape.kv_heads * shape.head_dim


def logits_bytes(package: Package, context: int) -> int:
    """Bytes of the logits of all tokens that are read at a time."""
    return 4 * min(CHUNK, context) * package.shape.vocab_size


def plain_memory(package: Package, context: int, kv: str) -> tuple[int, int]:
    """Bytes of a cache that keeps no more than a window needs, and of buffers."""
    window = package.shape.window
    slots = context if window is None or kv == "int8" else min(context, window + CHUNK)
    cache = kv_numbers(package) * slots * {"f32": 4, "f16": 2, "int8": 1}[kv]
    return cache, int(4.5 * logits_bytes(package, context))
