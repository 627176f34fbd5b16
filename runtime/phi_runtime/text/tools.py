"""Tools in phi-4-mini's format: described in the system turn, called between two tokens, answered in own turns.

Its published template writes the descriptions and the results, and no calls; these are written as the model says them.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OPEN, CLOSE = "<|tool_call|>", "<|/tool_call|>"


@dataclass(frozen=True)
class Call:
    """A function that a model wants to be called; arguments: a JSON object, as text."""

    name: str
    arguments: str


def described(functions: Sequence[Mapping[str, Any]]) -> str:
    """What stands behind the content of a system turn. functions: name, description, parameters (a JSON Schema)."""
    return f"<|tool|>{_json(list(functions))}<|/tool|>" if functions else ""


def written(calls: Sequence[Call]) -> str:
    """Calls as the model says them."""
    said = [{"name": c.name, "arguments": json.loads(c.arguments or "{}")} for c in calls]
    return f"{OPEN}{_json(said)}{CLOSE}" if said else ""


def read(text: str) -> tuple[str, list[Call]]:
    """What an answer says, and the calls behind that; malformed ones are part of what it says."""
    said, opened, rest = text.partition(OPEN)
    if not opened:
        return text, []
    try:
        found, end = json.JSONDecoder().raw_decode(rest.lstrip())
        behind = rest.lstrip()[end:].strip().removeprefix(CLOSE).strip()
        calls = [_call(one) for one in (found if isinstance(found, list) else [found])]
    except (ValueError, KeyError, TypeError, RecursionError):
        return text, []
    return (text, []) if behind or not calls else (said.strip(), calls)


def shown(text: str) -> int:
    """How many characters of an unfinished answer are surely not of a call."""
    at = text.find(OPEN)
    if at >= 0:
        return at
    held = next((n for n in range(min(len(OPEN) - 1, len(text)), 0, -1) if OPEN.startswith(text[-n:])), 0)
    return len(text) - held


def schema(functions: Sequence[Mapping[str, Any]], most: int | None) -> dict[str, Any]:
    """JSON Schema of one or more calls, of at most `most`."""
    options = [
        {
            "type": "object",
            "properties": {
                "name": {"const": f["name"]},
                "arguments": f.get("parameters") or {"type": "object", "additionalProperties": False},
            },
            "required": ["name", "arguments"],
            "additionalProperties": False,
        }
        for f in functions
    ]
    items = {"anyOf": options} if len(options) > 1 else options[0]
    return {"type": "array", "minItems": 1, "items": items} | ({} if most is None else {"maxItems": most})


def _call(one: Any) -> Call:
    name, arguments = one["name"], one.get("arguments", one.get("parameters", {}))
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise TypeError
    return Call(name, _json(arguments))


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)
