"""A Core ML package: a `decode` function for one token, a `prefill` function for a fixed chunk.

On macOS the functions run in the Core ML framework; elsewhere in the reference interpreter.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from phi_runtime.checkpoint import F32
from phi_runtime.config import Phi3Config
from phi_runtime.errors import BundleError, MissingExtraError

PREFILL, DECODE = "prefill", "decode"
PREFILL_TOKENS = 64  # length of the `prefill` function's input


class Function(Protocol):
    """One function of a package: arrays by name in, arrays by name out; the state changes in place."""

    def __call__(self, inputs: dict[str, np.ndarray], state: Any, /) -> dict[str, np.ndarray]:
        """Run it."""


@dataclass(frozen=True)
class Functions:
    """The functions of a package, and how to make the KV state that they share."""

    call: dict[str, Function]
    make_state: Callable[[], Any]


class CoreMLBackend:
    """Feeds a prompt in chunks of `PREFILL_TOKENS`, then token by token.

    The last chunk may be padded: the padding's keys lie behind every real token's sight, and the
    tokens to come overwrite them.
    """

    def __init__(self, name: str, functions: Functions, config: Phi3Config, context: int) -> None:
        self.name = name
        self.vocab_size = config.vocab_size
        self.context = context
        self._capacity = config.max_position_embeddings
        missing = {PREFILL, DECODE} - set(functions.call)
        if missing:
            raise BundleError(f"the Core ML package has no function {missing.pop()!r}; export the bundle again")
        self._functions = functions
        self._state = functions.make_state()
        self._position = 0

    @property
    def position(self) -> int:
        """Tokens in the KV cache."""
        return self._position

    def forward(self, tokens: list[int], every: bool) -> F32:
        """Append tokens; logits [T, vocab_size], or [1, vocab_size] of the last."""
        rows = []
        done = 0
        while done < len(tokens):
            chunk = tokens[done : done + PREFILL_TOKENS]
            # A lone token decodes; so does the end of the cache, where a padded chunk has no room.
            if len(chunk) == 1 or self._position + PREFILL_TOKENS > self._capacity:
                chunk = chunk[:1]
                rows.append(self._run(DECODE, chunk, 1))
            else:
                rows.append(self._run(PREFILL, chunk, PREFILL_TOKENS))
            done += len(chunk)
        return np.concatenate(rows) if every else rows[-1][-1:]

    def rewind(self, position: int) -> None:
        """Forget all tokens from `position` on."""
        self._position = position

    def close(self) -> None:
        """Drop the state."""
        self._state = None

    def _run(self, function: str, tokens: list[int], length: int) -> F32:
        padded = np.zeros((1, length), np.int32)
        padded[0, : len(tokens)] = tokens
        inputs = {
            "input_ids": padded,
            "position_ids": np.arange(self._position, self._position + length, dtype=np.int32),
        }
        logits = self._functions.call[function](inputs, self._state)["logits"]
        self._position += len(tokens)
        return np.asarray(logits[0, : len(tokens)], np.float32)


def coremltools_functions(path: Path) -> Functions:
    """The package in the Core ML framework (macOS 15 or later)."""
    try:
        import coremltools as ct
    except ImportError:
        raise MissingExtraError("coremltools", "coreml") from None
    try:
        models = {name: ct.models.MLModel(str(path), function_name=name) for name in (PREFILL, DECODE)}
    except Exception as e:  # the framework's errors share no base
        raise BundleError(f"{path}: Core ML cannot load it ({e}); it wants macOS 15 or later") from None

    def function(name: str) -> Function:
        def call(inputs: dict[str, np.ndarray], state: Any) -> dict[str, np.ndarray]:
            out: dict[str, np.ndarray] = models[name].predict(inputs, state=state)
            return out

        return call

    return Functions({name: function(name) for name in models}, models[DECODE].make_state)
