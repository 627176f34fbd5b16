"""The engines under measurement. One adapter is one small file here that defines `ADAPTER`, and its line in `NAMES`.

An adapter imports its engine only when it opens a model: the list of them works without any.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from phi_bench.records import Phase
from phi_runtime.errors import UsageError

# By module; the first that accepts a model runs it where nobody chose.
NAMES = {
    "phi-run": "phi_run",
    "llama-bench": "llama_bench",
    "genai": "genai",
    "mlx-lm": "mlx_lm",
    "transformers": "transformers",
    "openvino": "openvino",
    "optimum": "optimum",
}


@dataclass(frozen=True)
class Options:
    """How a model is opened. engine: one of several that an adapter has. context: tokens that have to fit. kv: type of
    the KV cache, None for the engine's own.
    """

    engine: str
    threads: int
    context: int
    kv: str | None = None


class Session(Protocol):
    """An open model and one text."""

    vocab_size: int
    context: int

    def generate(self, tokens: list[int], count: int) -> Iterator[int]:
        """Append tokens to the text, then give `count` greedy tokens, each as soon as it is computed."""

    def reset(self) -> None:
        """Begin an empty text."""

    def close(self) -> None:
        """Give back the memory."""


class Cancels(Protocol):
    """A session whose reading of a prompt another thread can end."""

    def cancel(self) -> None:
        """End what `generate` does now."""


class GivesLogits(Protocol):
    """A session that can be held to a checkpoint."""

    def logits(self, tokens: list[int]) -> np.ndarray:
        """Logits [len(tokens), vocab_size] of a text, read from its beginning."""


@dataclass(frozen=True)
class Work:
    """What a program that measures itself is to do."""

    prompt_tokens: int
    decode_tokens: int
    depths: tuple[int, ...]


def no_choice(kind: str | None) -> Callable[[Path, str, str | None], str | None]:
    """The KV cache of an engine that has one type."""

    def known(path: Path, engine: str, wanted: str | None) -> str | None:
        if wanted is not None:
            raise UsageError(f"{engine} has no choice of KV cache; leave out --kv, or {path}")
        return kind

    return known


@dataclass(frozen=True)
class Adapter:
    """An engine. engines: those of its that run a model here, by path; none for a model that it does not run. packages:
    whose versions are recorded. install: the command that brings it. says: its fastest documented way, in words.
    open: a session; measure: instead, where a program measures itself. judge: the adapter and engine that give the
    logits of the same file, None for none. kv: type of the cache by path, engine and what is wanted, an error for what
    it does not have. on_request: engines that run only where they are named. environment: the one of
    environments.py that it runs in, None for ours.
    """

    name: str
    packages: tuple[str, ...]
    install: str
    says: str
    engines: Callable[[Path], tuple[str, ...]]
    open: Callable[[Path, Options], Session] | None = None
    measure: Callable[[Path, Options, Work], list[Phase]] | None = None
    judge: Callable[[str], tuple[str, str] | None] = lambda _: None
    kv: Callable[[Path, str, str | None], str | None] = field(default_factory=lambda: no_choice(None))
    on_request: tuple[str, ...] = ()
    device: str = "cpu"
    environment: str | None = None


def folder_config(path: Path) -> dict[str, Any]:
    """A model folder's config.json; nothing where there is none that can be read."""
    try:
        found = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


@cache
def adapter(name: str) -> Adapter:
    """The adapter of that name. Raises UsageError."""
    if name not in NAMES:
        raise UsageError(f"no adapter {name!r}; choose from {', '.join(NAMES)}")
    return cast(Adapter, import_module(f"phi_bench.adapters.{NAMES[name]}").ADAPTER)


def choose(path: Path, wanted: str | None) -> list[tuple[str, str]]:
    """(adapter, engine) pairs that run a model: all engines of the first adapter that accepts it, or those of the one
    that is wanted, as `adapter` or `adapter:engine`. Raises UsageError.
    """
    if wanted is not None:
        name, _, engine = wanted.partition(":")
        known = adapter(name).engines(path)
        if not known:
            raise UsageError(f"{path}: {name} does not run it; leave out @{wanted}")
        if engine and engine not in known and engine not in adapter(name).on_request:
            raise UsageError(f"{path}: {name} has no engine {engine!r} for it; choose from {', '.join(known)}")
        return [(name, e) for e in ([engine] if engine else known)]
    for name in NAMES:
        if known := adapter(name).engines(path):
            return [(name, e) for e in known]
    raise UsageError(f"{path}: is nothing that {', '.join(NAMES)} run; give a bundle, a GGUF file or a model folder")
