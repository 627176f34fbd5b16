"""ik_llama.cpp, a fork of llama.cpp with faster kernels for processors, through its own Python package.

It reads the same files. Its API is that of an older llama.cpp, of which that package declares a part only.
"""

import ctypes
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from phi_runtime.backends.huge_pages import when_allocated
from phi_runtime.backends.llama_cpp import LlamaCppBackend
from phi_runtime.backends.record import EngineOptions
from phi_runtime.backends.waiting import LLAMA_CPP, short_spins
from phi_runtime.errors import MissingExtraError, UsageError
from phi_runtime.package.gguf_header import read_header
from phi_runtime.package.open import Package

# ggml types whose logits were a sixth of their spread away from llama.cpp's (0.1.5), or were not held to it.
_UNSOUND = {3: "Q4_1", 6: "Q5_0", 7: "Q5_1"}


class IkLlamaCppBackend(LlamaCppBackend):
    """A GGUF file on ik_llama.cpp's CPU engine."""

    name = "ik_llama.cpp"
    # Its cache gives NaN where a row begins anew beside others (0.1.5), so texts are answered one after the other.
    batch = None  # type: ignore[assignment]

    def __init__(self, path: Path, options: EngineOptions, crossover: int | None) -> None:
        assert options.kv == "f16", "others want its flash attention, which aborts the process on some texts"
        unsound = sorted({_UNSOUND[k] for k in read_header(path).types.values() if k in _UNSOUND})
        if unsound:
            raise UsageError(
                f"{path}: ik_llama.cpp computes {', '.join(unsound)} otherwise than llama.cpp; leave the backend out"
            )
        super().__init__(path, options, crossover)

    def drop(self, ctx: Any, row: int, position: int) -> None:
        """Forget all of a row from a position on."""
        self.library.llama_kv_cache_seq_rm(ctx, row, position, -1)

    def _library(self) -> Any:
        try:
            with short_spins(LLAMA_CPP):
                return _declared()
        except ImportError:
            raise MissingExtraError("ik_llama.cpp", "gguf-fast") from None

    def _set_model(self, params: Any) -> None:
        params.use_mmap = self._mapped
        params.repack_tensors = not self._mapped  # rows interleaved, as its fastest kernels want them
        if not self._mapped:
            self._progress = params.progress_callback = when_allocated(self.library.llama_progress_callback)

    def _set_context(self, params: Any) -> None:
        params.flash_attn = False

    def _free_model(self) -> None:
        self.library.llama_free_model(self.model)


class _Library(SimpleNamespace):
    """A module's functions; each library is itself alone."""

    __hash__ = object.__hash__  # type: ignore[assignment]


@cache
def _declared() -> Any:
    """The package's functions, and those of the library that it leaves out."""
    from ik_llama_cpp import _ctypes_api

    c = _ctypes_api._lib
    library = _Library(**vars(_ctypes_api))
    library.llama_log_callback = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)
    pointer, size, token, flag = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int32, ctypes.c_bool
    text = ctypes.c_char_p
    # Ours, theirs: two of those for text want the model there, and have twins that want the vocabulary.
    for name, theirs, arguments, result in (
        ("llama_log_set", None, [library.llama_log_callback, pointer], None),
        ("llama_kv_cache_seq_rm", None, [pointer, token, token, token], flag),
        ("llama_tokenize", "llama_vocab_tokenize", [pointer, text, token, pointer, token, flag, flag], token),
        ("llama_token_to_piece", "llama_token_to_piece_vocab", [pointer, token, text, token, token, flag], token),
        ("llama_detokenize", None, [pointer, pointer, token, text, token, flag, flag], token),
        ("llama_state_seq_get_size", None, [pointer, token], size),
        ("llama_state_seq_get_data", None, [pointer, pointer, size, token], size),
        ("llama_state_seq_set_data", None, [pointer, pointer, size, token], size),
    ):
        function = getattr(c, theirs or name)
        function.argtypes, function.restype = arguments, result
        setattr(library, name, function)
    return library


def open_package(package: Package, options: EngineOptions) -> IkLlamaCppBackend:
    """For llama.cpp's `RECORD`."""
    return IkLlamaCppBackend(package.path, options, package.shape.crossover)
