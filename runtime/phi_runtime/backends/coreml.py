"""A Core ML package: a `decode` function for one token, a `prefill` function for a fixed chunk.

On macOS the functions run in the Core ML framework; elsewhere in the reference interpreter.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from phi_runtime.architecture.decoder import F32, CacheShape
from phi_runtime.backends.record import EngineOptions, Record, plain_memory
from phi_runtime.errors import BundleError, MissingExtraError
from phi_runtime.package.open import Package

PREFILL, DECODE = "prefill", "decode"
PREFILL_TOKENS = 64  # length of the `prefill` function's input
USE_LONG = "use_long_rope"  # input [1] of models with LongRoPE: 1 for its long factors


class Function(Protocol):
    """One function of a package: arrays by name in, arrays by name out; the state changes in place."""

    def __call__(self, inputs: dict[str, np.ndarray], state: Any, /) -> dict[str, np.ndarray]:
        """Run it."""


@dataclass(frozen=True)
class Functions:
    """The functions of a package, how to make the KV state that they share, and its slots."""

    call: dict[str, Function]
    make_state: Callable[[], Any]
    slots: int
    long_rope: bool


def package_paths(artifact: Path) -> list[Path]:
    """The package, or all packages of a chain, given the first."""
    found = re.fullmatch(r"(.+)-1-of-(\d{1,3})(\.mlpackage)", artifact.name)
    if found is None:
        return [artifact]
    return [artifact.with_name(f"{found[1]}-{n}-of-{found[2]}{found[3]}") for n in range(1, int(found[2]) + 1)]


class CoreMLBackend:
    """Feeds a prompt in chunks of `PREFILL_TOKENS`, then token by token, through a chain of packages.

    The cache is a ring. A chunk begins at a multiple of its length; where one does not, the tokens from there on are
    read again. The last chunk may be padded: what the padding writes lies behind every real token's
    sight, and the tokens to come overwrite it.
    """

    def __init__(self, name: str, packages: list[Functions], model: CacheShape, context: int) -> None:
        self.name = name
        self.vocab_size = model.vocab_size
        self.context = context
        for package in packages:
            missing = {PREFILL, DECODE} - set(package.call)
            if missing:
                raise BundleError(f"the Core ML package has no function {missing.pop()!r}; export the bundle again")
        self._packages = packages
        self._states = [p.make_state() for p in packages]
        self._slots = min(p.slots for p in packages)
        self._window = model.window or context
        self._crossover = model.crossover if packages[0].long_rope else None
        self._tokens: list[int] = []
        self._written = 0  # positions that slots were written for, the padding's included
        self._long = False

    @property
    def position(self) -> int:
        """Tokens in the KV cache."""
        return len(self._tokens)

    def forward(self, tokens: list[int], all_logits: bool) -> F32:
        """Append tokens; logits [T, vocab_size], or [1, vocab_size] of the last."""
        held = len(self._tokens)
        self._tokens = [*self._tokens, *tokens]
        start = self._resume_at(held)
        rows = []
        while start < len(self._tokens):
            # A lone token decodes; so do the last of the context, where a padded chunk has no room.
            aligned = start - start % PREFILL_TOKENS
            if len(self._tokens) - start == 1 or aligned + PREFILL_TOKENS > self.context:
                rows.append(self._run(DECODE, start, 1))
                start += 1
                continue
            start = aligned
            stop = min(start + PREFILL_TOKENS, len(self._tokens))
            out = self._run(PREFILL, start, PREFILL_TOKENS)[: stop - start]
            rows.append(out[max(0, held - start) :])
            start = stop
        return np.concatenate(rows)[-len(tokens) :] if all_logits else rows[-1][-1:]

    def trim(self, position: int) -> None:
        """Forget all tokens from `position` on."""
        self._tokens = self._tokens[:position]

    def close(self) -> None:
        """Drop the state."""
        self._states = []

    def _resume_at(self, held: int) -> int:
        """Where to read on: behind what is held, or from the start where that is of no use any more."""
        long = self._crossover is not None and len(self._tokens) > self._crossover
        # Every slot that the next query sees must still hold the position it stands for.
        lost = (
            self._written - (held - held % PREFILL_TOKENS) > self._slots - self._window and self._written > self._slots
        )
        if long != self._long or lost:
            self._long, self._written = long, 0
            return 0
        return held

    def _run(self, function: str, start: int, length: int) -> F32:
        padded = np.zeros((1, length), np.int32)
        given = self._tokens[start : start + length]
        padded[0, : len(given)] = given
        values = {"input_ids": padded}
        positions = np.arange(start, start + length, dtype=np.int32)
        for package, state in zip(self._packages, self._states, strict=True):
            inputs = {**values, "position_ids": positions}
            if package.long_rope:
                inputs[USE_LONG] = np.array([int(self._long)], np.int32)
            values = package.call[function](inputs, state)
            if "hidden_out" in values:
                values = {"hidden": values["hidden_out"]}
        self._written = max(self._written, start + length)
        return np.asarray(values["logits"][0], np.float32)


def coremltools_functions(path: Path, units: str = "ALL") -> Functions:
    """The package in the Core ML framework (macOS 15 or later). units: one of coremltools' `ComputeUnit`."""
    try:
        import coremltools as ct
    except ImportError:
        raise MissingExtraError("coremltools", "coreml") from None
    try:
        models = {
            name: ct.models.MLModel(str(path), function_name=name, compute_units=ct.ComputeUnit[units])
            for name in (PREFILL, DECODE)
        }
        description = next(f for f in ct.utils.load_spec(str(path)).description.functions if f.name == DECODE)
    except Exception as e:  # the framework's errors share no base
        raise BundleError(f"{path}: Core ML cannot load it ({e}); it wants macOS 15 or later") from None

    def function(name: str) -> Function:
        def call(inputs: dict[str, np.ndarray], state: Any) -> dict[str, np.ndarray]:
            out: dict[str, np.ndarray] = models[name].predict(inputs, state=state)
            return out

        return call

    slots = int(description.state[0].type.stateType.arrayType.shape[2])
    long_rope = any(i.name == USE_LONG for i in description.input)
    return Functions({name: function(name) for name in models}, models[DECODE].make_state, slots, long_rope)


def open_package(package: Package, options: EngineOptions) -> CoreMLBackend:
    """In the Core ML framework, for `RECORD`; beside the processor it takes the GPU and the Neural Engine."""
    units = "CPU_ONLY" if options.device == "cpu" else "ALL"
    functions = [coremltools_functions(p, units) for p in package_paths(package.path)]
    return CoreMLBackend("coreml", functions, package.shape, options.context)


# Preferred first; the Core ML framework itself is found on macOS alone.
_MIL = {"mil-reference": "mil.interpreter:open_package"}
RECORD = Record(
    engines={"coreml": "coreml:open_package"} | _MIL if sys.platform == "darwin" else _MIL,
    module="google.protobuf",
    extra="coreml",
    process=100_000_000,
    kv_types=lambda package, engine: ("f16",),
    memory=plain_memory,
    devices=lambda engine: ("gpu", "cpu") if engine == "coreml" else ("cpu",),
    native=False,  # elsewhere than on Apple's devices it is interpreted
)
