"""llama.cpp through the C API that llama-cpp-python ships."""

import ctypes
import os
from collections import deque
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from phi_runtime.decoder import F32
from phi_runtime.engine import CHUNK
from phi_runtime.errors import BundleError, ContextError, MissingExtraError
from phi_runtime.tokenizer import check_unicode, spelt_byte

# Types that the KV cache may have, the default first: ggml's number of each, and bits per number stored.
KV_TYPES = {
    "f16": (1, 16.0),
    "q8_0": (8, 8.5),
    "q5_1": (7, 6.0),
    "q5_0": (6, 5.5),
    "q4_1": (3, 5.0),
    "iq4_nl": (20, 4.5),
    "q4_0": (2, 4.5),
}


class LlamaCppBackend:
    """A GGUF file on llama.cpp's CPU engine."""

    name = "llama.cpp"

    def __init__(self, path: Path, context: int, threads: int, kv: str = "f16") -> None:
        try:
            import llama_cpp
        except ImportError:
            raise MissingExtraError("llama.cpp", "gguf") from None
        self.library: Any = llama_cpp
        self.context = context
        self._position = 0
        log = _log_lines()
        log.clear()
        llama_cpp.llama_backend_init()

        model_params = llama_cpp.llama_model_default_params()
        model_params.n_gpu_layers = 0
        # GCC before 13 drops stores that ggml's AMX kernels need, and such a build dies at the first
        # token (ggml-org/llama.cpp#20824). The library does not tell its compiler: go without AMX.
        if b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info():
            model_params.use_extra_bufts = False
        else:
            _read_not_map(model_params)
        self.model = llama_cpp.llama_model_load_from_file(os.fsencode(path), model_params)
        if not self.model:
            why = next((line for line in log if "error" in line), "unknown reason")
            raise BundleError(f"{path}: llama.cpp cannot load it ({why.strip()}); export it again")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = context
        params.n_batch = params.n_ubatch = min(context, CHUNK)
        params.n_threads = params.n_threads_batch = threads
        params.type_k = params.type_v = KV_TYPES[kv][0]
        if kv == "f16":
            # Its flash attention on processors takes 1.6 times as long per token behind a thousand tokens; only a
            # cache of few bits cannot do without.
            params.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self._ctx = llama_cpp.llama_init_from_model(self.model, params)
        if not self._ctx:
            llama_cpp.llama_model_free(self.model)
            raise ContextError(f"{path}: llama.cpp cannot reserve a context of {context} tokens; ask for fewer")
        vocab = llama_cpp.llama_model_get_vocab(self.model)
        self.vocab_size = int(llama_cpp.llama_vocab_n_tokens(vocab))
        self._batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)

    @property
    def position(self) -> int:
        """Tokens in the KV cache."""
        return self._position

    def forward(self, tokens: list[int], every: bool) -> F32:
        """Append tokens; logits [T, vocab_size], or [1, vocab_size] of the last."""
        rows = []
        for start in range(0, len(tokens), CHUNK):
            chunk = tokens[start : start + CHUNK]
            last = start + len(chunk) == len(tokens)
            self._decode(chunk, every, last)
            wanted = range(len(chunk)) if every else [len(chunk) - 1] if last else []
            rows += [self._row(i) for i in wanted]
        return np.stack(rows)

    def rewind(self, position: int) -> None:
        """Forget all tokens from `position` on."""
        memory = self.library.llama_get_memory(self._ctx)
        self.library.llama_memory_seq_rm(memory, 0, position, -1)
        self._position = position

    def state(self) -> bytes:
        """The cache as llama.cpp lays it out."""
        size = self.library.llama_state_seq_get_size(self._ctx, 0)
        out = (ctypes.c_uint8 * size)()
        return bytes(out[: self.library.llama_state_seq_get_data(self._ctx, out, size, 0)])

    def restore(self, state: bytes, tokens: list[int]) -> None:
        """Put the cache back. Raises BundleError where llama.cpp finds it of another make."""
        self.rewind(0)
        data = (ctypes.c_uint8 * len(state)).from_buffer_copy(state)
        if self.library.llama_state_seq_set_data(self._ctx, data, len(state), 0) != len(state):
            self.rewind(0)
            raise BundleError("the session was saved with another context or cache; load the model with those")
        self._position = len(tokens)

    def close(self) -> None:
        """Free the context and the model."""
        if self._ctx:
            self.library.llama_batch_free(self._batch)
            self.library.llama_free(self._ctx)
            self.library.llama_model_free(self.model)
            self._ctx = None

    def __del__(self) -> None:
        if getattr(self, "_ctx", None):
            self.close()

    def _decode(self, chunk: list[int], every: bool, last: bool) -> None:
        batch = self._batch
        batch.n_tokens = len(chunk)
        for i, token in enumerate(chunk):
            batch.token[i] = token
            batch.pos[i] = self._position + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = every or (last and i == len(chunk) - 1)
        status = self.library.llama_decode(self._ctx, batch)
        if status != 0:
            raise ContextError(f"llama.cpp could not decode at position {self._position} (status {status})")
        self._position += len(chunk)

    def _row(self, i: int) -> F32:
        pointer = self.library.llama_get_logits_ith(self._ctx, i)
        return np.ctypeslib.as_array(pointer, shape=(self.vocab_size,)).copy()


class LlamaCppTokenizer:
    """The tokenizer that a GGUF file carries, by llama.cpp's own code; for files without a tokenizer.json."""

    def __init__(self, backend: LlamaCppBackend) -> None:
        self._backend = backend  # keeps the model alive, of which the vocabulary is a part
        self._c = backend.library
        self._vocab = self._c.llama_model_get_vocab(backend.model)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written in it are recognised, none are added."""
        check_unicode(text)
        raw = text.encode()
        out = (self._c.llama_token * (len(raw) + 16))()
        count = self._c.llama_tokenize(self._vocab, raw, len(raw), out, len(out), False, True)
        return list(out[: max(count, 0)])

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens; special tokens are left out."""
        given = (self._c.llama_token * len(tokens))(*tokens)
        size = 16 * len(tokens) + 64
        while True:
            out = ctypes.create_string_buffer(size)
            length = self._c.llama_detokenize(self._vocab, given, len(tokens), out, size, True, False)
            if length >= 0:
                return out.raw[:length].decode("utf-8", "replace")
            size = -length

    def byte(self, token: int) -> int | None:
        """The byte that a token spells, None if it spells something else."""
        return spelt_byte((self._c.llama_vocab_get_text(self._vocab, token) or b"").decode("utf-8", "replace"))


def _read_not_map(params: Any) -> None:
    """llama.cpp repacks weights for the processor into a copy: mapping the file as well would hold the model twice."""
    fields = {name for name, *_ in params._fields_}
    if "load_mode" in fields:  # 0: neither mapped nor locked
        params.load_mode = 0
    else:  # its name in older versions
        params.use_mmap = False


@cache
def _log_lines() -> deque[str]:
    """llama.cpp's last log lines, kept out of the terminal and at hand for our messages.

    The library has one log for the whole process and calls into Python for it, so the callback
    lives as long as the process does.
    """
    import llama_cpp

    lines: deque[str] = deque(maxlen=50)

    def collect(level: int, text: bytes, user_data: ctypes.c_void_p) -> None:
        lines.append(text.decode("utf-8", "replace"))

    callback = llama_cpp.llama_log_callback(collect)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    _CALLBACKS.append(callback)
    return lines


_CALLBACKS: list[Any] = []
