"""Documents of a corpus, read one at a time: JSON lines, Parquet, web archives, folders of texts and sources."""

import gzip
import json
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from phi_runtime.errors import NotFoundError, UsageError
from phi_train.curate.readers import PARQUET, WEB, parquet_lines, web_texts
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
    """The documents of a file of one of `RECORDS`, or of a folder of these or of .txt, .md and .py files.

    field: of a record, the text. A record that cannot be read is told of and the next one is read. Raises
    NotFoundError, UsageError for a file of another kind or a folder without documents.
    """
    for file, name in _files(path):
        if not _is_json_lines(file):
            yield from _whole(file, name, field)
            continue
        for number, (_, line) in enumerate(_bounded(file), 1):
            yield from _line(line, f"{name}:{number}", field)


JSON_LINES = (".jsonl", ".jsonl.gz")
RECORDS = (*JSON_LINES, *PARQUET, *WEB)


def _is_json_lines(path: Path) -> bool:
    return path.name.endswith(JSON_LINES)


def _line(line: bytes | None, where: str, field: str) -> Iterator[Document | Unreadable]:
    if line is None or len(line) > MAX_BYTES:
        yield Unreadable(where, f"longer than {MAX_BYTES:,} bytes, or the damaged rest of an archive")
    elif line.strip():
        yield _record(line, where, field)


def _whole(path: Path, name: str, field: str) -> Iterator[Document | Unreadable]:
    """A file that is not cut: a document, or many records."""
    if path.name.endswith(PARQUET):
        for number, row in enumerate(parquet_lines(path)):
            if isinstance(row, str):
                yield Unreadable(f"{name}:{number}", row)
            else:
                yield from _line(row, f"{name}:{number}", field)
    elif path.name.endswith(WEB):
        for number, (url, text, why) in enumerate(web_texts(path, MAX_BYTES)):
            if text is None:
                yield Unreadable(f"{name}:{number} {url}", why)
            else:
                page = {"id": f"{name}:{number}", field: text, "url": url}
                yield Document(f"{name}:{number}", text, json_line(page))
    else:
        yield _file(path, name, field)


def json_line(record: dict[str, Any]) -> bytes:
    """One line of JSON."""
    return json.dumps(record, ensure_ascii=False).encode() + b"\n"


@dataclass(frozen=True)
class Slice:
    """The lines of a file that begin from byte `start` on and before `stop`; a file that is a document, whole."""

    path: str
    name: str
    start: int
    stop: int


def slices(paths: list[Path], size: int) -> list[list[Slice]]:
    """The files of `read_documents`, in shards of about `size` bytes; a .jsonl may be cut, another file may not.

    Of several paths, names begin with their path. Raises UsageError for a file that is there twice, and the errors of
    `read_documents`.
    """
    shards: list[list[Slice]] = [[]]
    seen: set[Path] = set()
    filled = 0
    for file, name in ((f, n if len(paths) == 1 else f"{p}/{n}") for p in paths for f, n in _files(p)):
        if (whole := file.resolve()) in seen:
            raise UsageError(f"{file}: is read twice; name each input once")
        seen.add(whole)
        length, at = file.stat().st_size, 0
        cut = file.name.endswith(".jsonl")
        while at < length or (at == 0 and not cut):
            if filled >= size:
                shards.append([])
                filled = 0
            stop = min(length, at + size - filled) if cut else length
            shards[-1].append(Slice(str(file), name, at, stop))
            filled += stop - at
            at = max(1, stop)
    return [shard for shard in shards if shard]


def read_own(path: Path, field: str) -> Iterator[Document]:
    """The lines that a pass before has written, of whatever length."""
    with open(path, "rb") as f:
        for line in f:
            found = _record(line, path.name, field)
            assert isinstance(found, Document), found
            yield found


def read_slice(s: Slice, field: str) -> Iterator[Document | Unreadable]:
    """Its documents; a record without an id is named by its file and first byte."""
    path = Path(s.path)
    if _is_json_lines(path):
        for at, line in _bounded(path, s.start, s.stop):
            yield from _line(line, f"{s.name}@{at}", field)
    else:
        yield from _whole(path, s.name, field)


def _files(path: Path) -> list[tuple[Path, str]]:
    """Each with its name. Raises NotFoundError, UsageError."""
    if path.is_file():
        if not path.name.endswith(RECORDS):
            raise UsageError(f"{path}: is none of {', '.join(RECORDS)}; give one of these, or a folder of texts")
        return [(path, path.name)]
    if not path.is_dir():
        raise NotFoundError(f"{path}: no such file; give documents as JSON lines, or a folder of texts")
    lines = [(p, p.relative_to(path).as_posix()) for p in path.rglob("*") if p.name.endswith(RECORDS) and p.is_file()]
    found = sorted([*lines, *document_paths(str(path))], key=lambda pair: pair[1])
    if not found:
        raise UsageError(f"{path}: holds no documents; give a folder of .jsonl, .txt, .md or .py files")
    for file, name in found:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise UsageError(f"{os.fsencode(file)!r}: its name is not UTF-8; rename it") from None
    return found


def _file(path: Path, name: str, field: str) -> Document | Unreadable:
    if path.stat().st_size > MAX_BYTES:
        return Unreadable(name, f"larger than {MAX_BYTES:,} bytes")
    text = decoded(path.read_bytes())
    return Unreadable(name, "not UTF-8") if text is None else Document(name, text, json_line({"id": name, field: text}))


def _bounded(path: Path, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, bytes | None]]:
    """Lines and where each begins; None for one that is too long, and for the rest of a damaged archive."""
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as f:
        at = start
        if start:
            f.seek(start - 1)  # a line that begins at `start` is ours: what ends just before it is not
            at += _rest(f.readline(MAX_BYTES), f) - 1
        try:
            while (stop is None or path.suffix == ".gz" or at < stop) and (line := f.readline(MAX_BYTES)):
                whole = len(line) < MAX_BYTES or line.endswith(b"\n")
                yield at, line if whole else None
                at += len(line) if whole else _rest(line, f)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            yield at, None


def _rest(line: bytes, f: Any) -> int:
    """Read to the end of a line that was begun; its length."""
    length = len(line)
    while line and not line.endswith(b"\n"):
        line = f.readline(MAX_BYTES)
        length += len(line)
    return length


def _record(line: bytes, where: str, field: str) -> Document | Unreadable:
    try:
        record = msgspec.json.decode(line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        return Unreadable(where, "not UTF-8" if _is_foreign(line, e) else "not JSON")
    if not isinstance(record, dict) or not isinstance(text := record.get(field), str):
        return Unreadable(where, f"without a text in {field!r}")
    name = record.get("id", where)
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        return Unreadable(where, "with an id that is neither a text nor a number")
    return Document(str(name), text, line if line.endswith(b"\n") else line + b"\n")


def _is_foreign(line: bytes, e: Exception) -> bool:
    if isinstance(e, UnicodeDecodeError):
        return True
    try:
        line.decode()
    except UnicodeDecodeError:
        return True
    return False
