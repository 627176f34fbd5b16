"""Read and check the header of a GGUF file before any engine sees the file.

llama.cpp's own reader has been the way in for many a crafted file, and an engine that dies takes our process along;
here every length is held to what the file has left, and every tensor to the file's end.
(Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.)
"""

import hashlib
import mmap
import struct
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from phi_runtime.errors import BundleError

_SCALARS = "BbHhIif?"  # struct's letters of the value types 0 to 7
_STRING, _ARRAY = 8, 9
_WIDE = {10: "Q", 11: "q", 12: "d"}
_MOST = {"tensors": 1 << 16, "keys": 1 << 16, "dimensions": 4}
# Of each ggml type that files hold: weights per block, bytes per block.
TYPE_SIZES = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 16: (256, 66),
    17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82), 23: (256, 136),
    24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2), 34: (256, 54),
    35: (256, 66), 39: (32, 17),
}  # fmt: skip


@dataclass(frozen=True)
class Header:
    """Metadata, and of each tensor its bytes and ggml type; `digest` is of all that stands before the weights."""

    metadata: dict[str, Any]
    tensors: dict[str, int]
    types: dict[str, int]
    digest: str


class _Reader:
    def __init__(self, path: Path, data: mmap.mmap) -> None:
        self.path, self.data, self.at = path, data, 0

    def fail(self, what: str) -> BundleError:
        return BundleError(f"{self.path}: {what} at byte {self.at}; the file is damaged: download or export it again")

    def take(self, size: int, what: str) -> bytes:
        if size > len(self.data) - self.at:
            raise self.fail(f"{what} reaches beyond the file's end")
        self.at += size
        return self.data[self.at - size : self.at]

    def number(self, letter: str, what: str) -> Any:
        size = struct.calcsize("<" + letter)
        return struct.unpack("<" + letter, self.take(size, what))[0]

    def count(self, what: str, most: int) -> int:
        n: int = self.number("Q", what)
        if n > most:
            raise self.fail(f"{what} is {n}, more than can be")
        return n

    def text(self, what: str) -> str:
        length = self.number("Q", f"the length of {what}")
        return self.take(length, what).decode("utf-8", "replace")

    def value(self, kind: int, what: str) -> Any:
        if kind < len(_SCALARS):
            return self.number(_SCALARS[kind], what)
        if kind in _WIDE:
            return self.number(_WIDE[kind], what)
        if kind == _STRING:
            return self.text(what)
        if kind != _ARRAY:
            raise self.fail(f"{what} has the unknown type {kind}")
        inner = self.number("I", what)
        count = self.count(f"the count of {what}", len(self.data))
        if inner == _STRING:
            return [self.text(what) for _ in range(count)]
        letter = _SCALARS[inner] if inner < len(_SCALARS) else _WIDE.get(inner)
        if letter is None:
            raise self.fail(f"{what} is a list of the unknown type {inner}")
        raw = self.take(count * struct.calcsize("<" + letter), what)
        return list(struct.unpack(f"<{count}{letter}", raw))


def read_header(path: Path) -> Header:
    """Read and check the head of a file. Raises BundleError, which names what is wrong and where."""
    try:
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return _read(_Reader(path, data))
    except ValueError:  # mmap's word for an empty file
        raise BundleError(f"{path}: is empty; download or export it again") from None


def _read(r: _Reader) -> Header:
    if r.data[:4] != b"GGUF":
        raise BundleError(f"{r.path}: does not begin as a GGUF file does; give another")
    r.at = 4
    version = r.number("I", "the version")
    if version not in (2, 3):
        raise BundleError(f"{r.path}: is of GGUF version {version}, we read 2 and 3; convert it again")
    tensors, keys = r.count("the number of tensors", _MOST["tensors"]), r.count("the number of keys", _MOST["keys"])
    metadata: dict[str, Any] = {}
    for _ in range(keys):
        key = r.text("a key")
        if key in metadata:
            raise r.fail(f"the key {key!r} stands twice")
        metadata[key] = r.value(r.number("I", f"the type of {key!r}"), repr(key))
    pieces = metadata.get("tokenizer.ggml.tokens")
    if isinstance(pieces, list) and len({str(p) for p in pieces}) < len(pieces):
        raise r.fail("a token stands twice in the vocabulary, of which llama.cpp dies; it ends")
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or not 0 < alignment <= 1 << 16 or alignment & (alignment - 1):
        raise r.fail(f"general.alignment is {alignment!r}")
    places: dict[str, tuple[int, int]] = {}
    types: dict[str, int] = {}
    for _ in range(tensors):
        name = r.text("a tensor's name")
        if name in places:
            raise r.fail(f"the tensor {name!r} stands twice")
        dimensions = r.number("I", f"the dimensions of {name!r}")
        if not 1 <= dimensions <= _MOST["dimensions"]:
            raise r.fail(f"the tensor {name!r} has {dimensions} dimensions")
        shape = [r.number("Q", f"the shape of {name!r}") for _ in range(dimensions)]
        kind, offset = r.number("I", f"the type of {name!r}"), r.number("Q", f"the offset of {name!r}")
        if kind not in TYPE_SIZES:
            raise r.fail(f"the tensor {name!r} has the unknown type {kind}")
        block, size = TYPE_SIZES[kind]
        if min(shape) < 1 or shape[0] % block:
            raise r.fail(f"the tensor {name!r} has the shape {shape}")
        nbytes = shape[0] // block * size
        for n in shape[1:]:
            nbytes *= n
        if offset % alignment:
            raise r.fail(f"the tensor {name!r} is not aligned")
        places[name], types[name] = (offset, nbytes), kind
    start = -(-r.at // alignment) * alignment
    for name, (offset, nbytes) in places.items():
        if start + offset + nbytes > len(r.data):
            raise BundleError(
                f"{r.path}: the tensor {name!r} reaches beyond the file's end; download or export it again"
            )
    spans = sorted(places.values())
    if any(a + size > b for (a, size), (b, _) in pairwise(spans)):
        raise BundleError(f"{r.path}: tensors overlap; the file is damaged: download or export it again")
    digest = hashlib.sha256(r.data[: r.at]).hexdigest()
    return Header(metadata, {name: nbytes for name, (_, nbytes) in places.items()}, types, digest)
