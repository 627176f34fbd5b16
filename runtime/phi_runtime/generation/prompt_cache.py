"""Prompt cache files: a line of JSON, then the KV cache in its engine's own layout."""

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from phi_runtime.errors import BundleError, NotFoundError, UsageError
from phi_runtime.files import write_file
from phi_runtime.generation.engine import Engine

VERSION = 1
_MOST_LINE = 1 << 24


@runtime_checkable
class SupportsState(Protocol):
    """A backend whose cache can be taken out and put back."""

    def state(self) -> bytes:
        """The cache, as this very engine understands it."""

    def restore(self, state: bytes, tokens: list[int]) -> None:
        """Put it back, as what `tokens` left. Raises BundleError where it does not fit."""


def save(path: Path, engine: Engine, digest: str) -> None:
    """Write the engine's cache, and the tokens it stands for."""
    state = _keeper(engine).state() if engine.cached_tokens else b""
    head = {
        "phi_session": VERSION,
        "model": digest,
        "backend": engine.backend.name,
        "tokens": engine.cached_tokens,
        "bytes": len(state),
        "sha256": hashlib.sha256(state).hexdigest(),
    }
    write_file(path, json.dumps(head).encode() + b"\n" + state)


def load(path: Path, engine: Engine, digest: str) -> int:
    """Put back what `save` wrote; the number of tokens."""
    keeper = _keeper(engine)
    if not path.is_file():
        raise NotFoundError(f"{path}: no such file; save_session writes one")
    with open(path, "rb") as f:
        head = _head(path, f.readline(_MOST_LINE))
        state = f.read(head["bytes"] + 1)
    if len(state) != head["bytes"] or hashlib.sha256(state).hexdigest() != head["sha256"]:
        raise BundleError(f"{path}: is damaged (sha256); save the session again")
    if (head["model"], head["backend"]) != (digest, engine.backend.name):
        raise BundleError(f"{path}: was saved from another model or engine; save the session again")
    tokens = head["tokens"]
    engine.forget()
    if tokens:
        engine.check(tokens)
        keeper.restore(state, tokens)
        engine.cached_tokens = tokens
    return len(tokens)


def _keeper(engine: Engine) -> SupportsState:
    # ik_llama.cpp (0.1.5) goes on otherwise from a state that it took up again: its fifth token was another one.
    if not isinstance(engine.backend, SupportsState) or engine.backend.name == "ik_llama.cpp":
        raise UsageError(f"sessions cannot be kept on the backend {engine.backend.name}; use llama.cpp or onnxruntime")
    return engine.backend


def _head(path: Path, line: bytes) -> dict[str, Any]:
    try:
        head: dict[str, Any] = json.loads(line)
        if head["phi_session"] != VERSION:
            raise BundleError(
                f"{path}: is a session of version {head['phi_session']}, ours is {VERSION}; save it again"
            )
        tokens, size = head["tokens"], head["bytes"]
        good = type(size) is int and size >= 0 and all(type(t) is int for t in tokens)
        if good and isinstance(head["sha256"], str) and isinstance(tokens, list):
            return head
    except (ValueError, KeyError, TypeError, RecursionError):
        pass
    raise BundleError(f"{path}: is not a session that save_session wrote; save it again")
