"""llama.cpp through the C API that llama-cpp-python ships."""

import ctypes
import os
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from phi_runtime.architecture.decoder import F32
from phi_runtime.backends.huge_pages import when_allocated
from phi_runtime.backends.record import EngineOptions, Record, kv_numbers, logits_bytes
from phi_runtime.backends.waiting import LLAMA_CPP, short_spins
from phi_runtime.errors import BundleError, ContextError, MissingExtraError, UsageError
from phi_runtime.generation.engine import CHUNK
from phi_runtime.package.open import Package
from phi_runtime.text.tokenizer import check_tokens, check_unicode

_ALL_LAYERS = 9999  # to offload
PADDED = 256  # a context is a whole multiple of so many tokens
# Types that the KV cache may have, the default first: ggml's number of each, and bits per number stored.
KV_TYPES = {
    "f16": (1, 16.0),
    "q8_0": (8, 8.5),
    "q5_1": (7, 6.0),
    "q5_0": (6, 5.5),
    "q4_1": (3, 5.0),
    "iq4_nl": (20, 4.5),
    "q4_0": (2, 4.5),
    "f32": (0, 32.0),  # last: nobody's choice to save memory
}
WHOLE = ("f16", "f32")  # that need no flash attention


class LlamaCppBackend:
    """A GGUF file on llama.cpp."""

    name = "llama.cpp"

    def __init__(self, path: Path, options: EngineOptions, crossover: int | None) -> None:
        self.library = self._library()
        self.context = context = options.context
        self._path, self._threads, self._kv, self._device = path, options.threads, options.kv, options.device
        self._mapped = options.mapped
        # llama.cpp chooses LongRoPE's factors by the context that is reserved, not by the text's length: a text that
        # crosses over is read again in a context of the other size.
        self._crossover = crossover if crossover is not None and crossover < context else None
        self._tokens: list[int] = []
        self._held = 0  # of them, how many its cache holds
        self._ctx: Any = None
        log = _log_lines(self.library)
        log.clear()
        self.library.llama_backend_init()
        params = self.library.llama_model_default_params()
        params.n_gpu_layers = _ALL_LAYERS if options.device == "gpu" else 0
        self._set_model(params)
        self.model = self.library.llama_model_load_from_file(os.fsencode(path), params)
        if not self.model:
            why = next((line for line in log if "error" in line), "unknown reason")
            raise BundleError(f"{path}: {self.name} cannot load it ({why.strip()}); export it again")
        self.vocab_size = int(self.library.llama_vocab_n_tokens(self.library.llama_model_get_vocab(self.model)))
        self._batch = self.library.llama_batch_init(CHUNK, 0, 1)
        self._reserve(self._needed(0))

    @property
    def position(self) -> int:
        """Tokens in the KV cache."""
        return len(self._tokens)

    def forward(self, tokens: list[int], all_logits: bool) -> F32:
        """Append tokens; logits [T, vocab_size], or [1, vocab_size] of the last."""
        text = [*self._tokens, *tokens]
        if self._needed(len(text)) != self._reserved:
            self._reserve(self._needed(len(text)))
        wanted = len(text) - (len(tokens) if all_logits else 1)  # the first whose logits are
        rows = []
        for start in range(self._held, len(text), CHUNK):
            chunk = [(t, start + i, 0, start + i >= wanted) for i, t in enumerate(text[start : start + CHUNK])]
            rows += self.decode(self._ctx, chunk)
        self._tokens, self._held = text, len(text)
        return np.stack(rows)

    def trim(self, position: int) -> None:
        """Forget all tokens from `position` on."""
        self._tokens, self._held = self._tokens[:position], min(self._held, position)
        self.drop(self._ctx, 0, position)

    def state(self) -> bytes:
        """The cache as llama.cpp lays it out."""
        size = self.library.llama_state_seq_get_size(self._ctx, 0)
        out = (ctypes.c_uint8 * size)()
        return bytes(out[: self.library.llama_state_seq_get_data(self._ctx, out, size, 0)])

    def restore(self, state: bytes, tokens: list[int]) -> None:
        """Put the cache back. Raises BundleError where llama.cpp finds it of another make."""
        self.trim(0)
        if self._needed(len(tokens)) != self._reserved:
            self._reserve(self._needed(len(tokens)))
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if self.library.llama_state_seq_set_data(self._ctx, data, len(state), 0) != len(state):
            self.trim(0)
            raise BundleError("the session was saved with another context or cache; load the model with those")
        self._tokens, self._held = list(tokens), len(tokens)

    def batch(self, rows: int, slots: int) -> "LlamaCppBatch":
        """Room for several texts at once, of `slots` tokens each."""
        return LlamaCppBatch(self, rows, slots)

    def close(self) -> None:
        """Free the context and the model."""
        if self.model:
            self.library.llama_batch_free(self._batch)
            self.library.llama_free(self._ctx)
            self._free_model()
            self._ctx = self.model = None

    def __del__(self) -> None:
        if getattr(self, "_ctx", None):
            self.close()

    def new_context(self, slots: int, rows: int = 1) -> Any:
        """A context of its own: `slots` tokens for each of some rows. Raises ContextError."""
        params = self.library.llama_context_default_params()
        params.n_ctx, params.n_seq_max = slots * rows, rows
        params.n_batch = params.n_ubatch = min(slots * rows, CHUNK)
        params.n_threads = params.n_threads_batch = self._threads
        params.type_k = params.type_v = KV_TYPES[self._kv][0]
        self._set_context(params)
        found = self.library.llama_init_from_model(self.model, params)
        if not found:
            raise ContextError(f"{self._path}: {self.name} cannot reserve {slots * rows} tokens; ask for fewer")
        return found

    def decode(self, ctx: Any, given: list[tuple[int, int, int, bool]]) -> list[F32]:
        """Run up to CHUNK tokens (token, position, row, whether its logits are wanted); the logits that are."""
        batch = self._batch
        batch.n_tokens = len(given)
        for i, (token, position, row, wanted) in enumerate(given):
            batch.token[i] = token
            batch.pos[i] = position
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = row
            batch.logits[i] = wanted
        status = self.library.llama_decode(ctx, batch)
        if status != 0:
            raise ContextError(f"{self.name} could not decode at position {given[0][1]} (status {status})")
        rows = [self.library.llama_get_logits_ith(ctx, i) for i, (*_, wanted) in enumerate(given) if wanted]
        return [np.ctypeslib.as_array(row, shape=(self.vocab_size,)).copy() for row in rows]

    def drop(self, ctx: Any, row: int, position: int) -> None:
        """Forget all of a row from a position on."""
        self.library.llama_memory_seq_rm(self.library.llama_get_memory(ctx), row, position, -1)

    def _library(self) -> Any:
        return _imported()

    def _set_model(self, params: Any) -> None:
        # GCC before 13 drops stores that ggml's AMX kernels need, and such a build dies at the first
        # token (ggml-org/llama.cpp#20824). The library does not tell its compiler: go without AMX.
        if self._mapped or b"AMX_INT8 = 1" in self.library.llama_print_system_info():
            params.use_extra_bufts = False
        else:
            _read_not_map(params)
            self._progress = params.progress_callback = when_allocated(self.library.llama_progress_callback)

    def _set_context(self, params: Any) -> None:
        if self._kv in WHOLE and self._device == "cpu":
            # Its flash attention on processors takes 1.6 times as long per token behind a thousand tokens, and rounds
            # a cache of float32 to float16; only a cache of few bits cannot do without.
            params.flash_attn_type = self.library.LLAMA_FLASH_ATTN_TYPE_DISABLED

    def _free_model(self) -> None:
        self.library.llama_model_free(self.model)

    def _needed(self, total: int) -> int:
        return self._crossover if self._crossover is not None and total <= self._crossover else self.context

    def _reserve(self, context: int) -> None:
        if self._ctx:
            self.library.llama_free(self._ctx)
        self._ctx, self._reserved, self._held = self.new_context(context), context, 0


class LlamaCppBatch:
    """Texts side by side in one context, whose weights are read once for all of them."""

    def __init__(self, backend: LlamaCppBackend, rows: int, slots: int) -> None:
        self._backend = backend
        self._lengths = [0] * rows
        self._ctx = backend.new_context(-(-slots // PADDED) * PADDED, rows)

    def read(self, row: int, tokens: list[int]) -> F32:
        """Begin a text in a row; the logits [vocab_size] after it."""
        self._backend.drop(self._ctx, row, 0)
        logits: list[F32] = []
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            given = [(t, start + i, row, start + i == len(tokens) - 1) for i, t in enumerate(chunk)]
            logits = self._backend.decode(self._ctx, given)
        self._lengths[row] = len(tokens)
        return logits[0]

    def step(self, tokens: dict[int, int]) -> dict[int, F32]:
        """Append a token to some rows; the logits [vocab_size] of each."""
        given = [(t, self._lengths[row], row, True) for row, t in tokens.items()]
        logits = self._backend.decode(self._ctx, given)
        for row in tokens:
            self._lengths[row] += 1
        return dict(zip(tokens, logits, strict=True))

    def close(self) -> None:
        """Free the context."""
        self._backend.library.llama_free(self._ctx)


class LlamaCppTokenizer:
    """The tokenizer that a GGUF file carries, by llama.cpp's own code; for files without a tokenizer.json."""

    def __init__(self, backend: LlamaCppBackend) -> None:
        self._backend = backend  # keeps the model alive, of which the vocabulary is a part
        self._c = backend.library
        self._vocab = self._c.llama_model_get_vocab(backend.model)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written in it are recognised, none are added."""
        self._check([])
        check_unicode(text)
        raw = text.encode()
        out = (self._c.llama_token * (len(raw) + 16))()
        count = self._c.llama_tokenize(self._vocab, raw, len(raw), out, len(out), False, True)
        return list(out[: max(count, 0)])

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens; special tokens are left out. Raises TokenError for one outside the vocabulary."""
        self._check(tokens)
        given = (self._c.llama_token * len(tokens))(*tokens)
        size = 16 * len(tokens) + 64
        while True:
            out = ctypes.create_string_buffer(size)
            length = self._c.llama_detokenize(self._vocab, given, len(tokens), out, size, True, False)
            if length >= 0:
                return out.raw[:length].decode("utf-8", "replace")
            size = -length

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token spells, which may be a part of a character; none for a special token."""
        self._check([token])
        out = ctypes.create_string_buffer(1024)
        length = self._c.llama_token_to_piece(self._vocab, token, out, len(out), 0, False)
        return out.raw[: max(0, length)]

    def _check(self, tokens: list[int]) -> None:
        """The library aborts the process on a foreign token, and on a vocabulary that is gone."""
        if not self._backend.model:
            raise UsageError("this model is closed; load it again")
        check_tokens(tokens, self._backend.vocab_size)


def _imported() -> Any:
    try:
        with short_spins(LLAMA_CPP):
            import llama_cpp
    except ImportError:
        raise MissingExtraError("llama.cpp", "gguf") from None
    return llama_cpp


def _read_not_map(params: Any) -> None:
    """llama.cpp repacks weights for the processor into a copy: mapping the file as well would hold the model twice."""
    fields = {name for name, *_ in params._fields_}
    if "load_mode" in fields:  # 0: neither mapped nor locked
        params.load_mode = 0
    else:  # its name in older versions
        params.use_mmap = False


@cache
def _log_lines(library: Any) -> deque[str]:
    """llama.cpp's last log lines, kept out of the terminal and at hand for our messages.

    The library has one log for the whole process and calls into Python for it, so the callback
    lives as long as the process does.
    """
    lines: deque[str] = deque(maxlen=50)

    def collect(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        lines.append(text.decode("utf-8", "replace"))

    callback = library.llama_log_callback(collect)
    library.llama_log_set(callback, ctypes.c_void_p(0))
    _CALLBACKS.append(callback)
    return lines


_CALLBACKS: list[Any] = []


def open_package(package: Package, options: EngineOptions) -> LlamaCppBackend:
    """For `RECORD`."""
    return LlamaCppBackend(package.path, options, package.shape.crossover)


def _devices(engine: str) -> tuple[str, ...]:
    """A GPU first, where the installed llama.cpp was built for one; the fork is for processors."""
    if engine != "llama.cpp":
        return ("cpu",)
    return ("gpu", "cpu") if _imported().llama_supports_gpu_offload() else ("cpu",)


def _memory(package: Package, context: int, kv: str) -> tuple[int, int]:
    chunk, slots = min(CHUNK, context), -(-context // PADDED) * PADDED
    cache = int(kv_numbers(package) * slots * KV_TYPES[kv][1] / 8)
    scores = 4 * package.shape.heads * chunk * slots if kv in WHOLE else 0  # flash attention keeps none
    logits = logits_bytes(package, context) + (2 << 20) + 13 * chunk * slots
    return cache, max(logits, scores + (1 << 20)) + package.staging


RECORD = Record(
    engines={"llama.cpp": "llama_cpp:open_package", "ik_llama.cpp": "ik_llama_cpp:open_package"},
    on_request=("ik_llama.cpp",),
    devices=_devices,
    module="llama_cpp",
    extra="gguf",
    process=61_000_000,
    kv_types=lambda package, engine: tuple(KV_TYPES) if engine == "llama.cpp" else ("f16",),
    memory=_memory,
    tokenizer=lambda backend: LlamaCppTokenizer(backend) if isinstance(backend, LlamaCppBackend) else None,
)
