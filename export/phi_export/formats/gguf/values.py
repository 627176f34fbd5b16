"""Metadata values of a GGUF file: their types, and how each is written."""

import struct
from enum import IntEnum
from typing import Any


class Kind(IntEnum):
    """gguf_metadata_value_type, as far as we write it."""

    U32 = 4
    I32 = 5
    F32 = 6
    BOOL = 7
    STRING = 8
    ARRAY = 9


# A value and its type; an array's value is again (type of its elements, elements).
Metadata = dict[str, tuple[Kind, Any]]

_SCALARS = {Kind.U32: "<I", Kind.I32: "<i", Kind.F32: "<f", Kind.BOOL: "<?"}


def encode(kind: Kind, value: Any) -> bytes:
    """The bytes of a value, without its type."""
    if kind is Kind.STRING:
        return encode_string(value)
    if kind is Kind.ARRAY:
        element, items = value
        return struct.pack("<IQ", element, len(items)) + b"".join(encode(element, item) for item in items)
    return struct.pack(_SCALARS[kind], value)


def encode_string(text: str) -> bytes:
    """A length, then UTF-8."""
    raw = text.encode()
    return struct.pack("<Q", len(raw)) + raw
