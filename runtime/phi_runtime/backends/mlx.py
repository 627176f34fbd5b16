"""MLX through mlx_lm: Apple's GPUs, and processors elsewhere (`mlx[cpu]`).

On processors MLX adds up products in the activations' own type: in float16 the logits of a row of 3,072 weights are off
by 0.8 % (0.32.4). There the activations are float32, which costs twice the bytes of scales, and is exact.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from phi_runtime.architecture.decoder import F32
from phi_runtime.backends.record import EngineOptions, Record, plain_memory
from phi_runtime.errors import BundleError, MissingExtraError
from phi_runtime.generation.engine import CHUNK
from phi_runtime.package.open import Package

WEIGHTS = "model.safetensors"
_ON_PROCESSOR = sys.platform != "darwin"


class MlxBackend:
    """A folder that mlx_lm opens, with its own cache."""

    name = "mlx"

    def __init__(self, folder: Path, vocab_size: int, context: int, device: str) -> None:
        try:
            import mlx.core
            from mlx_lm.models.cache import make_prompt_cache
            from mlx_lm.utils import load_model
        except ImportError:
            raise MissingExtraError("mlx_lm", "mlx") from None
        self.vocab_size, self.context = vocab_size, context
        self._mx: Any = mlx.core
        try:
            self._model, _ = load_model(folder)  # runs no code from the folder
        except Exception as e:  # mlx's errors share no base
            raise BundleError(f"{folder}: mlx_lm cannot load it ({e}); export the bundle again") from None
        if device == "cpu":
            self._mx.set_default_device(self._mx.cpu)
            self._model.set_dtype(self._mx.float32)
        self._cache: Any = make_prompt_cache(self._model)
        self._position = 0

    @property
    def position(self) -> int:
        """Tokens in the KV cache."""
        return self._position

    def forward(self, tokens: list[int], all_logits: bool) -> F32:
        """Append tokens; logits [T, vocab_size], or [1, vocab_size] of the last."""
        rows = []
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            logits = self._model(self._mx.array([chunk]), cache=self._cache)[0]
            if all_logits or start + CHUNK >= len(tokens):
                rows.append(np.array((logits if all_logits else logits[-1:]).astype(self._mx.float32)))
            else:
                self._mx.eval([layer.state for layer in self._cache])  # computed now, so that chunks do not pile up
        self._position += len(tokens)
        return np.concatenate(rows)

    def trim(self, position: int) -> None:
        """Forget all tokens from `position` on."""
        for layer in self._cache:
            layer.trim(self._position - position)
        self._position = position

    def close(self) -> None:
        """Give back the memory."""
        self._model = self._cache = None


def open_package(package: Package, options: EngineOptions) -> MlxBackend:
    """For `RECORD`. MLX chooses its threads itself."""
    return MlxBackend(package.path.parent, package.shape.vocab_size, options.context, options.device)


def _memory(package: Package, context: int, kv: str) -> tuple[int, int]:
    cache, buffers = plain_memory(package, context, kv)
    if _ON_PROCESSOR and package.manifest is not None:  # scales, biases and vectors are twice as wide as in the file
        tensors = package.manifest.quantization.values()
        buffers += sum(4 * q.weights // q.block if q.block > 1 else 2 * q.weights for q in tensors)
    return cache, buffers


RECORD = Record(
    engines={"mlx": "mlx:open_package"},
    module="mlx_lm",
    extra="mlx",
    process=282_000_000,
    kv_types=lambda package, engine: ("f32" if _ON_PROCESSOR else "f16",),
    memory=_memory,
    devices=lambda _: ("cpu",) if _ON_PROCESSOR else ("gpu", "cpu"),
    native=not _ON_PROCESSOR,
)
