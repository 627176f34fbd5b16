"""Values between the program and its tests, as JSON with tags: plain data only, nothing that runs when it is read."""

import builtins
import json
import math
from collections.abc import Iterator
from typing import Any

MOST_ITEMS = 100_000  # of an iterator that a program returns
_DEPTH = 100


class Opaque:
    """A value that is not plain data: it has its type's name and is equal to nothing."""

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def __repr__(self) -> str:
        return f"<{self.kind}>"


def encode(value: Any) -> bytes:
    """One line of JSON. Subclasses of dict and list (Counter, namedtuple) go as what they hold."""
    return json.dumps(_tagged(value, _DEPTH)).encode()


def decode(line: bytes) -> Any:
    """The value of a line. Raises ValueError for a line that `encode` does not write."""
    try:
        return _plain(json.loads(line), _DEPTH)
    except (ValueError, TypeError, AttributeError, RecursionError) as e:
        raise ValueError(f"is no value: {e}") from None


def _tagged(value: Any, depth: int) -> Any:
    if depth == 0:
        raise ValueError("is nested too deeply")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        return {"i": hex(value)}  # without the limit on decimal digits
    if isinstance(value, float):
        return {"f": value.hex() if math.isfinite(value) else repr(float(value))}
    if isinstance(value, complex):
        return {"c": [value.real.hex(), value.imag.hex()]}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (bytes, bytearray)):
        return {"b": bytes(value).hex()}
    for tag, kind in (("l", list), ("t", tuple), ("s", set), ("z", frozenset)):
        if isinstance(value, kind):
            return {tag: [_tagged(v, depth - 1) for v in value]}
    if isinstance(value, dict):
        return {"d": [[_tagged(k, depth - 1), _tagged(v, depth - 1)] for k, v in value.items()]}
    if isinstance(value, range):
        return {"r": [value.start, value.stop, value.step]}
    if isinstance(value, Iterator):
        items = []
        for item in value:
            items.append(_tagged(item, depth - 1))
            if len(items) > MOST_ITEMS:
                raise ValueError("is an iterator without an end")
        return {"n": items}
    name = str(getattr(value, "__name__", ""))
    if isinstance(value, type) and vars(builtins).get(name) is value:
        return {"y": name}
    return {"o": type(value).__name__}


def _plain(value: Any, depth: int) -> Any:
    if depth == 0:
        raise ValueError("nested too deeply")
    if value is None or isinstance(value, (bool, str)):
        return value
    if not isinstance(value, dict) or len(value) != 1:
        raise ValueError("no tag")
    ((tag, held),) = value.items()
    match tag:
        case "i":
            return int(held, 16)
        case "f":
            return float.fromhex(held)
        case "c":
            real, imag = held
            return complex(float.fromhex(real), float.fromhex(imag))
        case "b":
            return bytes.fromhex(held)
        case "l":
            return [_plain(v, depth - 1) for v in held]
        case "t":
            return tuple(_plain(v, depth - 1) for v in held)
        case "s":
            return {_plain(v, depth - 1) for v in held}
        case "z":
            return frozenset(_plain(v, depth - 1) for v in held)
        case "d":
            return {_plain(k, depth - 1): _plain(v, depth - 1) for k, v in held}
        case "r":
            return range(*held)
        case "n":
            return iter([_plain(v, depth - 1) for v in held])
        case "y":
            kind = getattr(builtins, held)
            if not isinstance(kind, type):
                raise ValueError("no type")
            return kind
        case "o":
            return Opaque(str(held))
    raise ValueError(f"the tag {tag!r}")
