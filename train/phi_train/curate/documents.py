"""Documents of a corpus, read one at a time: files of JSON lines, or folders of texts and sources."""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from phi_runtime.errors import NotFoundError, UsageError
from phi_train.data.corpus import decoded, document_paths

MAX_BYTES = 16 << 20  # of a document; a line without an end would otherwise fill the memory


@dataclass(frozen=True)
class Document:
    """A text, its name, and the line of JSON that it is written back as."""

    id: str
    text: str
    line: bytes


@dataclass(frozen=True)
class Unreadable:
    """What stands where a document was expected, and why it is none."""

    id: str
    why: str


def read_documents(path: Path, field: str = "text") -> Iterator[Document | Unreadable]:
    """The documents of a .jsonl or .jsonl.gz file, or of a folder of these or of .txt, .md and .py files.

    field: of a line, the text. A record that cannot be read is told of and the next one is read. Raises NotFoundError,
    UsageError for a file of another kind or a folder without documents.
    """
    if path.is_dir():
        lines = sorted(p for p in path.rglob("*") if is_json_lines(p))
        files = [] if lines else document_paths(str(path))
        if not lines and not files:
            raise UsageError(f"{path}: holds no documents; give a folder of .jsonl, .txt, .md or .py files")
        for file in lines:
            yield from _lines(file, f"{file.relative_to(path).as_posix()}:", field)
        for file, name in files:
            yield _file(file, name)
    elif not path.is_file():
        raise NotFoundError(f"{path}: no such file; give documents as JSON lines, or a folder of texts")
    elif is_json_lines(path):
        yield from _lines(path, f"{path.name}:", field)
    else:
        raise UsageError(f"{path}: is neither .jsonl nor .jsonl.gz; give documents as JSON lines, or a folder of texts")


def is_json_lines(path: Path) -> bool:
    """By its name."""
    return path.name.endswith((".jsonl", ".jsonl.gz"))


def json_line(record: dict[str, Any]) -> bytes:
    """One line of JSON."""
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


def _file(path: Path, name: str) -> Document | Unreadable:
    if path.stat().st_size > MAX_BYTES:
        return Unreadable(name, f"larger than {MAX_BYTES:,} bytes")
    text = decoded(path.read_bytes())
    return (
        Unreadable(name, "not UTF-8") if text is None else Document(name, text, json_line({"id": name, "text": text}))
    )


def _lines(path: Path, prefix: str, field: str) -> Iterator[Document | Unreadable]:
    for number, line in enumerate(_bounded(path), 1):
        where = f"{prefix}{number}"
        if line is None:
            yield Unreadable(where, f"longer than {MAX_BYTES:,} bytes, or its archive is damaged")
        elif line.strip():
            yield _record(line, where, field)


def _bounded(path: Path) -> Iterator[bytes | None]:
    """Lines; None for one that is too long, and for the rest of a damaged archive."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as f:
        try:
            while line := f.readline(MAX_BYTES):
                if len(line) < MAX_BYTES or line.endswith(b"\n"):
                    yield line
                else:
                    while line and not line.endswith(b"\n"):
                        line = f.readline(MAX_BYTES)
                    yield None
        except (EOFError, zlib.error, gzip.BadGzipFile):
            yield None


def _record(line: bytes, where: str, field: str) -> Document | Unreadable:
    try:
        record = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        return Unreadable(where, "not UTF-8" if _is_foreign(line, e) else "not JSON")
    if not isinstance(record, dict) or not isinstance(text := record.get(field), str):
        return Unreadable(where, f"without a text in {field!r}")
    name = record.get("id")
    return Document(name if isinstance(name, str) else where, text, line if line.endswith(b"\n") else line + b"\n")


def _is_foreign(line: bytes, e: Exception) -> bool:
    if isinstance(e, UnicodeDecodeError):
        return True
    try:
        line.decode()
    except UnicodeDecodeError:
        return True
    return False
