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


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Rows of codes as a stream of `bits` bits each, the first in the lowest bits: uint8 [rows, columns * bits / 8].

    Negative codes become two's complement. Columns times bits must fill whole bytes.
    """
    c = codes.view(np.uint8) if codes.dtype == np.int8 else codes.astype(np.uint8, copy=False)
    if bits == 8:
        return c
    c = c & np.uint8((1 << bits) - 1)
    if bits in (2, 4):
        out = c[:, 0 :: 8 // bits].copy()
        for i in range(1, 8 // bits):
            out |= c[:, i :: 8 // bits] << np.uint8(bits * i)
        return out
    # Groups of 8 codes make `bits` whole bytes.
    wide = c.reshape(len(c), -1, 8).astype(np.uint64)
    word = np.zeros(wide.shape[:2], np.uint64)
    for i in range(8):
        word |= wide[:, :, i] << np.uint64(bits * i)
    stream = word[:, :, None].view(np.uint8).reshape(*word.shape, 8)[:, :, :bits]
    return np.ascontiguousarray(stream).reshape(len(c), -1)


def unpack(packed: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """The inverse of `pack`, along the last axis: uint8, or int8 where signed."""
    if bits == 8:
        return packed.view(np.int8) if signed else packed
    if bits in (2, 4):
        codes = np.empty((*packed.shape, 8 // bits), np.uint8)
        for i in range(8 // bits):
            np.bitwise_and(packed >> np.uint8(bits * i), np.uint8((1 << bits) - 1), out=codes[..., i])
    else:
        lanes = packed.reshape(*packed.shape[:-1], -1, bits).astype(np.uint64)
        word = np.zeros(lanes.shape[:-1], np.uint64)
        for i in range(bits):
            word |= lanes[..., i] << np.uint64(8 * i)
        codes = np.empty((*word.shape, 8), np.uint8)
        for i in range(8):
            codes[..., i] = (word >> np.uint64(bits * i)) & np.uint64((1 << bits) - 1)
    flat = codes.reshape(*packed.shape[:-1], -1)
    if not signed:
        return flat
    return (flat << np.uint8(8 - bits)).view(np.int8) >> np.int8(8 - bits)
