"""The weight file of an ML Program: a head, then entries of metadata and data, each on 64 bytes.

Layout (Apple's MILBlob storage, version 2): file head u32 count, u32 version; each entry
u32 sentinel, u32 type, u64 bytes, u64 offset of the data, u64 padding bits.
"""

import struct
from pathlib import Path

import numpy as np

from phi_runtime.errors import BundleError
from phi_runtime.package.bits import unpack

ALIGN = 64
VERSION = 2
SENTINEL = 0xDEADBEEF
FILE_HEAD = struct.Struct("<II56x")
ENTRY_HEAD = struct.Struct("<IIQQQ32x")
# Storage type and bits by element type; narrow integers are a stream of bits, the first in the lowest.
_KINDS = {
    "float16": (1, 16), "float32": (2, 32), "uint8": (3, 8), "int8": (4, 8), "int4": (8, 4), "int32": (14, 32),
    "uint2": (10, 2), "uint4": (11, 4), "uint3": (12, 3), "uint6": (13, 6),
}  # fmt: skip
BLOB_TYPES = {name: kind for name, (kind, _) in _KINDS.items()}
BITS = {name: bits for name, (_, bits) in _KINDS.items()}


class BlobReader:
    """A weight file; every entry is held to the file's size before it is read.

    Read and not mapped, so that what was read does not stay in memory.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size = path.stat().st_size
        head = self._bytes(0, FILE_HEAD.size)
        if len(head) < FILE_HEAD.size or FILE_HEAD.unpack(head.tobytes())[1] != VERSION:
            raise BundleError(f"{path}: is not a version-{VERSION} weight file; export the bundle again")

    def read(self, offset: int, dtype: str, count: int, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Elements start..stop of the entry of `count` whose head is at `offset`; narrow integers become 8 bits wide.

        `start` and `stop` must lie on whole bytes (for 3 and 6 bits, on multiples of 8 elements).
        """
        bits, size = BITS.get(dtype, 0), self._size
        if offset % ALIGN or offset < 0 or offset + ENTRY_HEAD.size > size:
            raise BundleError(f"{self._path}: entry offset {offset} lies outside the file's {size} bytes")
        sentinel, kind, nbytes, place, _ = ENTRY_HEAD.unpack(self._bytes(offset, ENTRY_HEAD.size).tobytes())
        if sentinel != SENTINEL or not bits or kind != BLOB_TYPES[dtype] or nbytes != (count * bits + 7) // 8:
            raise BundleError(f"{self._path}: the entry at {offset} is not {count} elements of {dtype}")
        if place + nbytes > size:
            raise BundleError(f"{self._path}: the entry at {offset} claims bytes beyond the file's {size}")
        stop = count if stop is None else min(stop, count)
        first = start * bits // 8
        raw = self._bytes(place + first, (stop * bits + 7) // 8 - first)
        if bits in (16, 32) or dtype in ("uint8", "int8"):
            return np.frombuffer(raw, np.dtype(dtype))
        return unpack(raw, bits, dtype.startswith("int"))[: stop - start]

    def _bytes(self, offset: int, count: int) -> np.ndarray:
        return np.fromfile(self._path, np.uint8, count, offset=offset)
