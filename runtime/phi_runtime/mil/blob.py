"""The weight file of an ML Program: a head, then entries of metadata and data, each on 64 bytes.

Layout (Apple's MILBlob storage, version 2): file head u32 count, u32 version; each entry
u32 sentinel, u32 type, u64 bytes, u64 offset of the data, u64 padding bits.
"""

import struct
from pathlib import Path

import numpy as np

from phi_runtime.errors import BundleError

ALIGN = 64
VERSION = 2
SENTINEL = 0xDEADBEEF
FILE_HEAD = struct.Struct("<II56x")
ENTRY_HEAD = struct.Struct("<IIQQQ32x")
# Storage type by element type; int4 packs two elements a byte, the first in the low half.
BLOB_TYPES = {"float16": 1, "float32": 2, "int8": 4, "int4": 8, "int32": 14}
_BITS = {1: 16, 2: 32, 4: 8, 8: 4, 14: 32}


class BlobReader:
    """A mapped weight file; every entry is held to the file's size before it is read."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        if self._data.size < FILE_HEAD.size or FILE_HEAD.unpack(self._data[: FILE_HEAD.size].tobytes())[1] != VERSION:
            raise BundleError(f"{path}: is not a version-{VERSION} weight file; export the bundle again")

    def read(self, offset: int, dtype: str, count: int) -> np.ndarray:
        """The entry whose head is at `offset`: [count] elements, int4 unpacked to int8."""
        bits = _BITS.get(BLOB_TYPES.get(dtype, 0), 0)
        size = self._data.size
        if offset % ALIGN or offset + ENTRY_HEAD.size > size:
            raise BundleError(f"{self._path}: entry offset {offset} lies outside the file's {size} bytes")
        sentinel, kind, nbytes, start, _ = ENTRY_HEAD.unpack(self._data[offset : offset + ENTRY_HEAD.size].tobytes())
        if sentinel != SENTINEL or not bits or kind != BLOB_TYPES[dtype] or nbytes != (count * bits + 7) // 8:
            raise BundleError(f"{self._path}: the entry at {offset} is not {count} elements of {dtype}")
        if start + nbytes > size:
            raise BundleError(f"{self._path}: the entry at {offset} claims bytes beyond the file's {size}")
        raw = self._data[start : start + nbytes]
        if dtype == "int4":
            return unpack_int4(raw)[:count]
        return np.frombuffer(raw, np.dtype(dtype))


def unpack_int4(packed: np.ndarray) -> np.ndarray:
    """Signed 4-bit values [2 n] as int8 from bytes [n], low half first."""
    out = np.empty(2 * packed.size, np.int8)
    out[0::2] = (packed << 4).view(np.int8) >> 4
    out[1::2] = packed.view(np.int8) >> 4
    return out
