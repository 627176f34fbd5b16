"""onnxruntime with one KV buffer per layer, written in place: no copy of the cache per token."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from phi_runtime.decoder import F32, CacheShape
from phi_runtime.engine import CHUNK
from phi_runtime.errors import BundleError, MissingExtraError

WINDOWED = "model.onnx.windowed"  # beside the graph: the same for a cache of the window's size


_PROVIDERS = ["CPUExecutionProvider"]


class OnnxRuntimeBackend:
    """An ONNX decoder whose past and present keys and values share their buffers."""

    name = "onnxruntime"

    def __init__(self, path: Path, model: CacheShape, context: int, threads: int) -> None:
        try:
            import onnxruntime
        except ImportError:
            raise MissingExtraError("onnxruntime", "onnx") from None
        self.context = context
        self.vocab_size = model.vocab_size
        self._ort: Any = onnxruntime
        self._tokens: list[int] = []
        self._reread = False
        # With LongRoPE the graph switches tables by the length so far: a prompt that crosses over is read at once,
        # and what was read with the short factors is read again.
        self._crossover = model.crossover
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.log_severity_level = 3
        self._chunk, self._slots = CHUNK, context
        self._window = model.window
        self._session: Any = self._open_windowed(path, options)
        try:
            if self._session is None:
                self._session = onnxruntime.InferenceSession(str(path), options, providers=_PROVIDERS)
        except Exception as e:  # the library's errors share no base of their own
            raise BundleError(f"{path}: onnxruntime cannot load it ({_first_line(e)}); export it again") from None
        shape = (1, model.kv_heads, self._slots, model.head_dim)
        past = next((i for i in self._session.get_inputs() if i.name == "past_key_values.0.key"), None)
        real = np.float16 if past is not None and past.type == "tensor(float16)" else np.float32
        # Zeroed once; `attention_mask` says how much of each buffer counts.
        self._caches = {
            f"{layer}.{part}": onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, real))
            for layer in range(model.layers)
            for part in ("key", "value")
        }
        self._binding: Any = self._bind()

    def _bind(self) -> Any:
        """Logits, then all caches as input and output both; they stay bound from call to call."""
        binding = self._session.io_binding()
        binding.bind_output("logits", "cpu")
        for name, cache in self._caches.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", cache)
            binding.bind_ortvalue_output(f"present.{name}", cache)
        return binding

    def _open_windowed(self, path: Path, options: Any) -> Any:
        """The graph whose cache holds the window and one chunk; None where it would save nothing, or where this build
        of onnxruntime does not have it: the other graph gives the same logits in more memory.
        """
        windowed = path.with_name(WINDOWED)
        if self._window is None or not windowed.is_file():
            return None
        chunk = min(CHUNK, max(16, self._window // 4))
        slots = self._window + chunk
        if slots >= self.context:
            return None
        try:
            session = self._ort.InferenceSession(str(windowed), options, providers=_PROVIDERS)
        except Exception as e:
            if "sliding_window_cache" in str(e):
                return None
            raise BundleError(f"{windowed}: onnxruntime cannot load it ({_first_line(e)}); export it again") from None
        self._chunk, self._slots = chunk, slots
        return session

    def _first_held(self, total: int) -> int:
        """The position in a windowed cache's first row after `total` tokens: onnxruntime moves whole rows at a time."""
        if self._window is None or total <= self._slots:
            return 0
        step = self._slots - self._window + 1
        return step * -(-(total - self._slots) // step)

    @property
    def position(self) -> int:
        """Tokens in the KV cache."""
        return len(self._tokens)

    def forward(self, tokens: list[int], every: bool) -> F32:
        """Append tokens; logits [T, vocab_size], or [1, vocab_size] of the last."""
        total = len(self._tokens) + len(tokens)
        if self._reread:  # the cache no longer holds what a rewind went back to
            kept, self._tokens, self._reread = self._tokens, [], False
            self.forward(kept, every=False)
        if self._crossover is not None and len(self._tokens) <= self._crossover < total:
            again, self._tokens = self._tokens + tokens, []
            first = self._crossover + CHUNK  # the first run reaches beyond; the others follow in pieces
            cuts = [0, *range(first, total, CHUNK), total]
            rows = [self._run(again[a:b]) for a, b in pairwise(cuts)]
            rows = [np.concatenate(rows)[-len(tokens) :]]
        else:
            rows = [self._run(tokens[i : i + self._chunk]) for i in range(0, len(tokens), self._chunk)]
        return np.concatenate(rows) if every else rows[-1][-1:]

    def rewind(self, position: int) -> None:
        """Forget all tokens from `position` on."""
        before, self._tokens = len(self._tokens), self._tokens[:position]
        shorter = self._crossover is not None and position <= self._crossover < before
        gone = self._first_held(position) != self._first_held(before)
        self._reread = position > 0 and (self._reread or shorter or gone)

    def state(self) -> bytes:
        """The filled rows of all caches, one cache after the other, in their own type."""
        rows = min(len(self._tokens), self._slots)
        return b"".join(cache.numpy()[:, :, :rows].tobytes() for cache in self._caches.values())

    def restore(self, state: bytes, tokens: list[int]) -> None:
        """Put the rows back. Raises BundleError where they are of another size."""
        rows = min(len(tokens), self._slots)
        for i, (name, cache) in enumerate(self._caches.items()):
            array = np.zeros_like(cache.numpy())
            part = array[:, :, :rows]
            if len(state) != part.nbytes * len(self._caches):
                raise BundleError("the session was saved with another context; load the model with that one")
            part[:] = np.frombuffer(state, array.dtype, part.size, i * part.nbytes).reshape(part.shape)
            self._caches[name] = self._ort.OrtValue.ortvalue_from_numpy(array)
        self._binding = self._bind()
        self._tokens, self._reread = list(tokens), False

    def close(self) -> None:
        """Free the session and the cache."""
        self._session = self._binding = None
        self._caches = {}

    def _run(self, tokens: list[int]) -> F32:
        total = len(self._tokens) + len(tokens)
        binding = self._binding
        binding.bind_cpu_input("input_ids", np.array([tokens], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        binding.bind_output("logits", "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as e:
            raise BundleError(f"onnxruntime cannot run the model ({_first_line(e)}); export the bundle again") from None
        self._tokens = [*self._tokens, *tokens]
        return np.asarray(binding.get_outputs()[0].numpy()[0], np.float32)


def _first_line(e: Exception) -> str:
    return str(e).strip().splitlines()[0]
