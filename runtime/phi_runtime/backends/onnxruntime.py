"""onnxruntime with one KV buffer per layer, written in place: no copy of the cache per token."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from phi_runtime.architecture.decoder import F32, CacheShape
from phi_runtime.backends import waiting
from phi_runtime.backends.record import EngineOptions, Record, plain_memory
from phi_runtime.errors import BundleError, MissingExtraError
from phi_runtime.generation.engine import CHUNK
from phi_runtime.package.manifest import ExportOptions
from phi_runtime.package.open import Package

# Beside the graph: the same for a cache of the window's size, and for one of 8 bits.
WINDOWED, INT8_KV = "model.onnx.windowed", "model.onnx.int8-kv"


_TYPES: dict[str, type] = {"tensor(float16)": np.float16, "tensor(int8)": np.int8}
_PROVIDERS = ["CPUExecutionProvider"]


class OnnxRuntimeBackend:
    """An ONNX decoder whose past and present keys and values share their buffers."""

    name = "onnxruntime"

    def __init__(
        self, path: Path, model: CacheShape, context: int, threads: int, kv: str, mapped: bool = False
    ) -> None:
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
        if mapped:
            options.add_session_config_entry("session.disable_prepacking", "1")
        if waiting.ONNXRUNTIME:
            options.add_session_config_entry("session.intra_op.spin_duration_us", waiting.ONNXRUNTIME)
        self._chunk, self._slots = CHUNK, context
        self._window = model.window
        if kv == "int8":
            path = path.with_name(INT8_KV)
        self._session: Any = self._open_windowed(path, options) if kv != "int8" else None
        self._windowed = self._session is not None
        try:
            if self._session is None:
                self._session = onnxruntime.InferenceSession(str(path), options, providers=_PROVIDERS)
        except Exception as e:  # the library's errors share no base of their own
            raise BundleError(f"{path}: onnxruntime cannot load it ({_first_line(e)}); export it again") from None
        self._model = model
        past = next((i for i in self._session.get_inputs() if i.name == "past_key_values.0.key"), None)
        self._cached = _TYPES.get(past.type if past is not None else "", np.float32)
        self._caches = self.caches(1, self._slots)
        self._binding: Any = self.bind(self._caches)

    def caches(self, rows: int, slots: int) -> dict[str, np.ndarray]:
        """Empty keys and values of all layers: zeroed once; `attention_mask` says how much of each buffer counts."""
        m = self._model
        names = [f"{layer}.{part}" for layer in range(m.layers) for part in ("key", "value")]
        return {name: np.zeros((rows, m.kv_heads, slots, m.head_dim), self._cached) for name in names}

    def bind(self, caches: dict[str, np.ndarray]) -> Any:
        """Logits, then all caches as input and output both; they stay bound from call to call."""
        binding = self._session.io_binding()
        binding.bind_output("logits", "cpu")
        for name, cache in caches.items():
            value = self._ort.OrtValue.ortvalue_from_numpy(cache)  # on the array's own memory
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
        return binding

    def run(self, binding: Any, tokens: np.ndarray, mask: np.ndarray) -> F32:
        """Logits [rows, T, vocab_size] of tokens [rows, T]; the mask has ones for what each row holds then."""
        binding.bind_cpu_input("input_ids", tokens)
        binding.bind_cpu_input("attention_mask", mask)
        binding.bind_output("logits", "cpu")
        try:
            self._session.run_with_iobinding(binding)
        except Exception as e:
            raise BundleError(f"onnxruntime cannot run the model ({_first_line(e)}); export the bundle again") from None
        return np.asarray(binding.get_outputs()[0].numpy(), np.float32)

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

    def forward(self, tokens: list[int], all_logits: bool) -> F32:
        """Append tokens; logits [T, vocab_size], or [1, vocab_size] of the last."""
        total = len(self._tokens) + len(tokens)
        if self._reread:  # the cache no longer holds what a rewind went back to
            kept, self._tokens, self._reread = self._tokens, [], False
            self.forward(kept, all_logits=False)
        if self._crossover is not None and len(self._tokens) <= self._crossover < total:
            again, self._tokens = self._tokens + tokens, []
            first = self._crossover + CHUNK  # the first run reaches beyond; the others follow in pieces
            cuts = [0, *range(first, total, CHUNK), total]
            rows = [self._run(again[a:b]) for a, b in pairwise(cuts)]
            rows = [np.concatenate(rows)[-len(tokens) :]]
        else:
            rows = [self._run(tokens[i : i + self._chunk]) for i in range(0, len(tokens), self._chunk)]
        return np.concatenate(rows) if all_logits else rows[-1][-1:]

    def trim(self, position: int) -> None:
        """Forget all tokens from `position` on."""
        before, self._tokens = len(self._tokens), self._tokens[:position]
        shorter = self._crossover is not None and position <= self._crossover < before
        gone = self._first_held(position) != self._first_held(before)
        self._reread = position > 0 and (self._reread or shorter or gone)

    def state(self) -> bytes:
        """The filled rows of all caches, one cache after the other, in their own type."""
        rows = min(len(self._tokens), self._slots)
        return b"".join(cache[:, :, :rows].tobytes() for cache in self._caches.values())

    def restore(self, state: bytes, tokens: list[int]) -> None:
        """Put the rows back. Raises BundleError where they are of another size."""
        rows = min(len(tokens), self._slots)
        for i, cache in enumerate(self._caches.values()):
            part = cache[:, :, :rows]
            if len(state) != part.nbytes * len(self._caches):
                raise BundleError("the session was saved with another context; load the model with that one")
            part[:] = np.frombuffer(state, cache.dtype, part.size, i * part.nbytes).reshape(part.shape)
        self._tokens, self._reread = list(tokens), False

    def batch(self, rows: int, slots: int) -> "OnnxRuntimeBatch":
        """Room for several texts at once, of `slots` tokens each."""
        fewest = self._slots if self._windowed else min(slots, self._slots)
        return OnnxRuntimeBatch(self, rows, fewest, self._chunk)

    def close(self) -> None:
        """Free the session and the cache."""
        self._session = self._binding = None
        self._caches = {}

    def _run(self, tokens: list[int]) -> F32:
        total = len(self._tokens) + len(tokens)
        logits = self.run(self._binding, np.array([tokens], np.int64), np.ones((1, total), np.int64))
        self._tokens = [*self._tokens, *tokens]
        return np.asarray(logits[0])


class OnnxRuntimeBatch:
    """Texts side by side: each is read alone, and its tokens are then computed with the others'."""

    def __init__(self, backend: OnnxRuntimeBackend, rows: int, slots: int, chunk: int) -> None:
        self._backend, self._chunk = backend, chunk
        self._caches = backend.caches(rows, slots)
        self._lengths = np.zeros(rows, np.int64)
        self._binding = backend.bind(self._caches)

    def read(self, row: int, tokens: list[int]) -> F32:
        """Begin a text in a row; the logits [vocab_size] after it."""
        own = self._backend.bind({name: cache[row : row + 1] for name, cache in self._caches.items()})
        self._lengths[row] = 0
        for start in range(0, len(tokens), self._chunk):
            chunk = np.array([tokens[start : start + self._chunk]], np.int64)
            self._lengths[row] += chunk.shape[1]
            logits = self._backend.run(own, chunk, np.ones((1, self._lengths[row]), np.int64))
        return np.asarray(logits[0, -1])

    def step(self, tokens: dict[int, int]) -> dict[int, F32]:
        """Append a token to some rows; the logits [vocab_size] of each. The others begin anew, with a token 0."""
        given = np.zeros((len(self._lengths), 1), np.int64)
        kept = np.isin(np.arange(len(given)), list(tokens))
        self._lengths = np.where(kept, self._lengths, 0) + 1
        for row, token in tokens.items():
            given[row] = token
        mask = (np.arange(self._lengths.max()) < self._lengths[:, None]).astype(np.int64)
        logits = self._backend.run(self._binding, given, mask)
        return {row: logits[row, -1] for row in tokens}

    def close(self) -> None:
        """Drop the caches."""
        self._caches = {}
        self._binding = None


def _first_line(e: Exception) -> str:
    return str(e).strip().splitlines()[0]


def open_package(package: Package, options: EngineOptions) -> OnnxRuntimeBackend:
    """For `RECORD`. The cache lies in the processor's memory and is written in place, so no other provider is used."""
    o = options
    return OnnxRuntimeBackend(package.path, package.shape, o.context, o.threads, o.kv, o.mapped)


def _kv_types(package: Package, engine: str) -> tuple[str, ...]:
    options = package.manifest.options if package.manifest is not None else ExportOptions()
    own = "f16" if options.profile == "fp16" else "f32"
    return (own, "int8") if options.int8_kv else (own,)


def _memory(package: Package, context: int, kv: str) -> tuple[int, int]:
    cache, buffers = plain_memory(package, context, kv)
    # Its peak may be where the weights are packed, before there is a cache.
    return cache, max(buffers, int(0.36 * package.weights) - cache)


RECORD = Record(
    engines={"onnxruntime": "onnxruntime:open_package"},
    module="onnxruntime",
    extra="onnx",
    process=79_000_000,
    kv_types=_kv_types,
    memory=_memory,
)
