"""Documents of Parquet files and of web archives (WARC, WET), one at a time."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from phi_runtime.errors import missing_extra

PARQUET = (".parquet",)
WEB = (".warc", ".warc.gz", ".wet", ".wet.gz")
_ROWS = 16  # of a Parquet file, that are held; each may be megabytes


def parquet_lines(path: Path) -> Iterator[bytes | str]:
    """The rows of a Parquet file as lines of JSON, or why there are no further ones. Raises MissingExtraError.

    Columns that JSON does not have are left out. Memory: of a row group.
    """
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as e:
        raise missing_extra(e, "data") from None
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            kept = [f.name for f in file.schema_arrow if _is_json(f.type, pa)]
            for batch in file.iter_batches(_ROWS, columns=kept, use_threads=False):
                for n in range(batch.num_rows):
                    yield _row(batch, n)
    except (pa.ArrowException, OSError, ValueError) as e:
        yield f"a damaged Parquet file ({' '.join(str(e).split())[:100]})"


def _row(batch: Any, number: int) -> bytes | str:
    """One row as JSON, or why it is none."""
    try:
        row = {name: batch.column(name)[number].as_py() for name in batch.schema.names}
        return json.dumps(row, ensure_ascii=False).encode() + b"\n"
    except ValueError:
        return "not UTF-8"


def _is_json(kind: Any, pa: Any) -> bool:
    t = pa.types
    if t.is_list(kind) or t.is_large_list(kind) or t.is_dictionary(kind):
        return _is_json(kind.value_type, pa)
    text = t.is_string(kind) or t.is_large_string(kind) or t.is_string_view(kind)
    return bool(text or t.is_integer(kind) or t.is_boolean(kind))


def web_texts(path: Path, most: int) -> Iterator[tuple[str, str | None, str]]:
    """Address, text and, where that is None, why not, of an archive's pages; other records are passed over.

    Plain texts (WET) as they are; of HTML, what trafilatura takes for its main text. most: bytes of a page. Raises
    MissingExtraError.
    """
    try:
        import warcio
        from trafilatura import extract
    except ImportError as e:
        raise missing_extra(e, "web") from None
    with open(path, "rb") as f:
        records = warcio.ArchiveIterator(f)
        while True:
            try:
                record = next(records)
                found = _page(record, most, extract)
            except StopIteration:
                return
            except (warcio.exceptions.ArchiveLoadFailed, OSError, ValueError, EOFError) as e:
                yield path.name, None, f"a damaged archive ({' '.join(str(e).split())[:100]})"
                return
            if found is not None:
                yield found


def _page(record: Any, most: int, extract: Any) -> tuple[str, str | None, str] | None:
    plain = record.rec_type == "conversion"
    if not plain and record.rec_type != "response":
        return None
    headers = record.rec_headers if plain else record.http_headers
    kind = str((headers and headers.get_header("Content-Type")) or "")
    status = "200" if plain or not record.http_headers else record.http_headers.get_statuscode()
    if status != "200" or not kind.startswith(("text/plain", "text/html", "application/xhtml")):
        return None
    name = str(record.rec_headers.get_header("WARC-Target-URI") or record.rec_headers.get_header("WARC-Record-ID"))
    if not str(record.rec_headers.get_header("Content-Length")).isdigit():
        return name, None, "a record that does not say its length"
    raw = record.content_stream().read(most + 1)
    if len(raw) > most:
        return name, None, f"longer than {most:,} bytes"
    if getattr(record.raw_stream, "limit", 0) > 0 and not record.raw_stream.read(1):
        return name, None, "cut: the archive ends within it"
    if plain or kind.startswith("text/plain"):
        try:
            return name, raw.decode("utf-8"), ""
        except UnicodeDecodeError:
            return name, None, "not UTF-8"
    try:
        text = extract(raw, include_comments=False)
    except Exception as e:  # of whatever a page does to a parser
        return name, None, f"no HTML that can be read ({type(e).__name__})"
    return (name, text, "") if text else (name, None, "a page without a main text")
