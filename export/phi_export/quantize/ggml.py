"""ggml's own quantisers, in the library that llama-cpp-python ships: what they write, llama.cpp reads."""

import ctypes
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from phi_export.quantize.uniform import U8
from phi_runtime.architecture.decoder import F32
from phi_runtime.errors import MissingExtraError

_NAMES = ("libggml-base.so", "libggml-base.dylib", "ggml-base.dll")


@dataclass(frozen=True)
class GgmlType:
    """A row of ggml's type table: its id, weights and bytes per block."""

    name: str
    number: int
    block: int
    block_bytes: int
    symbol: str  # as in dequantize_row_<symbol>


def quantize(x: F32, kind: GgmlType, importance: F32 | None = None) -> U8:
    """Rows [rows, columns] as [rows, bytes per row], squared errors weighted by the columns' importance, if given.

    The same input gives the same bytes on any thread.
    """
    rows, columns = x.shape
    x = np.ascontiguousarray(x)
    out = np.empty((rows, columns // kind.block * kind.block_bytes), np.uint8)
    weights = None if importance is None else np.ascontiguousarray(importance, np.float32)
    pointer = None if weights is None else weights.ctypes.data
    written = _library().ggml_quantize_chunk(kind.number, x.ctypes.data, out.ctypes.data, 0, rows, columns, pointer)
    assert written == out.nbytes, (kind, written, out.nbytes)
    return out


def dequantize(data: U8, kind: GgmlType) -> F32:
    """The inverse, as llama.cpp computes: [rows, columns] of [rows, bytes per row]."""
    rows, row_bytes = data.shape
    data = np.ascontiguousarray(data)
    out = np.empty((rows, row_bytes // kind.block_bytes * kind.block), np.float32)
    function = getattr(_library(), f"dequantize_row_{kind.symbol}")
    function.argtypes, function.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64], None
    function(data.ctypes.data, out.ctypes.data, out.size)
    return out


@cache
def _library() -> Any:
    """libggml-base; loaded from its own path, because importing llama_cpp takes longer than a dry run may."""
    spec = find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise MissingExtraError("llama_cpp, whose quantisers write GGUF,", "gguf")
    folder = Path(spec.origin).parent / "lib"
    path = next((folder / n for n in _NAMES if (folder / n).exists()), None)
    if path is None:
        raise MissingExtraError(f"libggml-base in {folder}", "gguf")
    library = ctypes.CDLL(str(path))
    chunk = library.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    return library
