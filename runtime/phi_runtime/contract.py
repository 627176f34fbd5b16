"""Typed records at the borders of the program: files and requests, decoded strictly, and their JSON Schemas."""

import difflib
import re
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, TypeVar

import msgspec

from phi_runtime.errors import PhiError

T = TypeVar("T")
Count = Annotated[int, msgspec.Meta(ge=1, le=(1 << 63) - 1)]
Size = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Amount = Annotated[float, msgspec.Meta(ge=0)]  # finite, because JSON has no other numbers


class Contract(msgspec.Struct, frozen=True):
    """A record that newer versions may add fields to: unknown ones are ignored."""


class StrictContract(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A record that people write: an unknown field is a mistake."""


def decode(raw: bytes | str, kind: type[T]) -> T:
    """A record from JSON.

    Raises ValueError in one line that names the field: an unknown one with the nearest, a wrong one with what it
    should be.
    """
    try:
        return msgspec.json.decode(raw, type=kind)
    except msgspec.ValidationError as e:
        raise ValueError(_explain(str(e), kind)) from None
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError):
        raise ValueError("is not valid JSON") from None


def read_record(path: Path, kind: type[T], error: type[PhiError], remedy: str) -> T:
    """A record from a JSON file; an error of type `error` names the file, the field and the remedy."""
    try:
        return decode(path.read_bytes(), kind)
    except ValueError as e:
        raise error(f"{path}: {e}; {remedy}") from None


def convert(value: object, kind: type[T], strict: bool = True) -> T:
    """A record from dictionaries and lists, as TOML gives them. strict: whether text does not stand for numbers.

    Raises ValueError as `decode` does.
    """
    try:
        return msgspec.convert(value, kind, strict=strict)
    except msgspec.ValidationError as e:
        raise ValueError(_explain(str(e), kind)) from None


def encode(record: msgspec.Struct) -> str:
    """The JSON text of a record, indented."""
    raw = msgspec.json.encode(record, enc_hook=lambda number: number.item())  # of NumPy
    return msgspec.json.format(raw, indent=1).decode() + "\n"


def json_schema(kind: type) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a record."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | msgspec.json.schema(kind)


def nearest(name: str, known: Collection[str]) -> str:
    """A hint at the closest of some names, nothing where none is close."""
    longer = [k for k in known if name and k.startswith(name)]
    close = longer[:1] or difflib.get_close_matches(name, list(known), 1, 0.4)
    return f" (did you mean {close[0]}?)" if close else ""


def _explain(message: str, kind: type) -> str:
    """msgspec's message with the field in front: "optimizer.lr: expected `float`, got `str`"."""
    said, _, path = message.partition(" - at `")
    where = path.rstrip("`").removeprefix("key in `").removeprefix("$").lstrip(".")
    if found := re.fullmatch(r"Object (contains unknown|missing required) field `(.*)`", said):
        name = ".".join(filter(None, (where, found[2])))
        if found[1] == "missing required":
            return f"{name}: is missing"
        return f"{name}: unknown field{nearest(found[2], _schema_at(kind, where).get('properties', {}))}"
    if found := re.fullmatch(r"Invalid enum value '(.*)'", said):
        values = _schema_at(kind, where).get("enum", [])
        return f"{where}: {found[1]!r} is none of {', '.join(values)}{nearest(found[1], values)}"
    said = said[:1].lower() + said[1:]
    return f"{where}: {said}" if where else said


def _schema_at(kind: type, path: str) -> dict[str, Any]:
    """The JSON Schema of a field: `optimizer.lr`, `files[0].name`, or of the record itself."""
    (schema,), components = msgspec.json.schema_components([kind], ref_template="{name}")
    for part in ["", *re.findall(r"\[|[^.\[\]]+", re.sub(r"\[[^\]]*\]", "[", path))]:
        if part == "[":
            schema = schema.get("items", schema.get("additionalProperties", {}))
        elif part:
            schema = schema.get("properties", {}).get(part, {})
        options = [components.get(s.get("$ref"), s) for s in schema.get("anyOf", [schema])]
        schema = next((s for s in options if s.keys() & {"properties", "enum", "items"}), options[0])
        if "enum" in schema and {"type": "boolean"} in options:
            schema = schema | {"enum": [*schema["enum"], "true", "false"]}
    return schema
