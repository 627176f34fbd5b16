"""onnxruntime with one KV buffer per layer, written in place: no copy of the cache per token."""

from pathlib import Path
from typing import Any

import numpy as np

from phi_runtime.checkpoint import F32
from phi_runtime.config import Phi3Config
from phi_runtime.errors import BundleError, MissingExtraError

_CHUNK = 256  # tokens per run; bounds the activations and the logits


class OnnxRuntimeBackend:
    """An ONNX decoder whose past and present keys and values share their buffers."""

    name = "onnxruntime"

    def __init__(self, path: Path, config: Phi3Config, context: int, threads: int) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtraError("onnxruntime", "onnx") from None
        self.context = context
        self.vocab_size = config.vocab_size
        self._ort: Any = onnxruntime
        self._position = 0
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        try:
            self._session: Any = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as e:  # the library's errors share no base of their own
            raise BundleError(f"{path}: onnxruntime cannot load it ({_first_line(e)}); export it again") from None
        shape = (1, config.num_key_value_heads, context, config.head_dim)
        # Zeroed once; `attention_mask` says how much of each buffer counts.
        self._caches = {
            f"{layer}.{part}": onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))
            for layer in range(config.num_hidden_layers)
            for part in ("key", "value")
        }

    @property
    def position(self) -> int:
        """Tokens in the KV cache."""
        return self._position

    def forward(self, tokens: list[int], every: bool) -> F32:
        """Append tokens; logits [T, vocab_size], or [1, vocab_size] of the last."""
        rows = [self._run(tokens[i : i + _CHUNK]) for i in range(0, len(tokens), _CHUNK)]
        return np.concatenate(rows) if every else rows[-1][-1:]

    def rewind(self, position: int) -> None:
        """Forget all tokens from `position` on."""
        self._position = position

    def close(self) -> None:
        """Free the session and the cache."""
        self._session = None
        self._caches = {}

    def _run(self, tokens: list[int]) -> F32:
        total = self._position + len(tokens)
        binding = self._session.io_binding()
        binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", cache)
            binding.bind_ortvalue_output(f"present.{name}", cache)
        binding.bind_output("logits", "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as e:
            raise BundleError(f"onnxruntime cannot run the model ({_first_line(e)}); export the bundle again") from None
        self._position = total
        logits: F32 = binding.get_outputs()[-1].numpy()[0]
        return logits


def _first_line(e: Exception) -> str:
    return str(e).strip().splitlines()[0]
