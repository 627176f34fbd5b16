"""Parquet files and web archives as documents; hostile ones."""

import io
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import run_here
from warcio.statusandheaders import StatusAndHeaders
from warcio.warcwriter import WARCWriter

from phi_train.curate.documents import Document, Unreadable, read_documents

PAGE = (
    "<html><body><nav>Home About Contact</nav><article><h1>Why ice floats</h1><p>Ice is less dense than water, because "
    "its molecules stand apart in a lattice. That is why it floats on lakes.</p><p>Fish live below it all winter, in "
    "water of four degrees.</p></article><footer>All rights reserved</footer></body></html>"
)


def read(path, field="text"):
    found = list(read_documents(path, field))
    return [d for d in found if isinstance(d, Document)], [u for u in found if isinstance(u, Unreadable)]


def test_rows_of_parquet(tmp_path):
    table = pa.table({
        "content": [f"text {n}" for n in range(1000)] + [None, "é" * 10],
        "id": [f"d{n}" for n in range(1002)],
        "stars": range(1002), "score": [0.5] * 1002, "blob": [b"\xff"] * 1002, "tags": [["a", "b"]] * 1002,
    })  # fmt: skip
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=300)
    documents, unreadable = read(tmp_path / "a.parquet", "content")
    assert [d.text for d in documents] == [f"text {n}" for n in range(1000)] + ["é" * 10]
    assert json.loads(documents[3].line) == {"content": "text 3", "id": "d3", "stars": 3, "tags": ["a", "b"]}
    assert [u.why for u in unreadable] == ["without a text in 'content'"]


def test_damaged_parquet(tmp_path):
    pq.write_table(pa.table({"text": ["x" * 100 + str(n) for n in range(5000)]}), tmp_path / "a.parquet",
                   row_group_size=500)  # fmt: skip
    raw = (tmp_path / "a.parquet").read_bytes()
    for n, content in enumerate((b"", b"PAR1", raw[:1000], raw[:500] + b"\xff" * 400 + raw[900:], raw[-2000:])):
        path = tmp_path / f"{n}.parquet"
        path.write_bytes(content)
        _documents, unreadable = read(path)
        assert len(unreadable) == 1 and "damaged Parquet" in unreadable[0].why, n


@pytest.fixture
def archive(tmp_path):
    def written(name, pages):
        """pages: (record type, content type, status, body)."""
        with open(tmp_path / name, "wb") as f:
            writer = WARCWriter(f, gzip=name.endswith(".gz"))
            for n, (kind, content, status, body) in enumerate(pages):
                headers = None
                if kind == "response":
                    headers = StatusAndHeaders(status, [("Content-Type", content)], protocol="HTTP/1.1")
                raw = body if isinstance(body, bytes) else body.encode()
                writer.write_record(
                    writer.create_warc_record(
                        f"http://example.com/{n}", kind, payload=io.BytesIO(raw), http_headers=headers,
                        warc_content_type=content if headers is None else None,
                    )
                )  # fmt: skip
        return tmp_path / name

    return written


def test_pages_of_a_web_archive(archive):
    path = archive("a.warc.gz", [
        ("warcinfo", "application/warc-fields", "", "software: x"),
        ("response", "text/html; charset=utf-8", "200 OK", PAGE),
        ("response", "text/html", "404 Not Found", PAGE), ("response", "image/png", "200 OK", b"\x89PNG"),
        ("response", "text/plain", "200 OK", "plain words"), ("response", "text/html", "200 OK", b"\xff\x00" * 50),
        ("response", "text/plain", "200 OK", b"\xff\xfe\xff"),
    ])  # fmt: skip
    documents, unreadable = read(path)
    assert [d.text for d in documents][1:] == ["plain words"]
    assert documents[0].text.startswith("Why ice floats\n") and "Home" not in documents[0].text
    assert json.loads(documents[0].line)["url"] == "http://example.com/1" and len({d.id for d in documents}) == 2
    assert [u.why for u in unreadable] == ["a page without a main text", "not UTF-8"]


def test_texts_of_a_wet_archive_and_damaged_ones(archive, tmp_path):
    path = archive("a.wet.gz", [("conversion", "text/plain", "", f"text number {n}") for n in range(50)])
    documents, unreadable = read(path)
    assert len(documents) == 50 and not unreadable
    raw = path.read_bytes()
    for n, content in enumerate((raw[: len(raw) // 2], raw[:700] + b"\0" * 900, b"no archive at all")):
        broken = tmp_path / f"{n}.wet.gz"
        broken.write_bytes(content)
        documents, unreadable = read(broken)
        assert len(documents) < 50 and len(unreadable) <= 1, n
    (tmp_path / "plain.warc").write_bytes(b"not a web archive\r\n\r\n" * 10)
    documents, unreadable = read(tmp_path / "plain.warc")
    assert not documents and "damaged archive" in unreadable[0].why


def test_a_pipeline_over_all_of_them(archive, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    archive("x.warc.gz", [("response", "text/html", "200 OK", PAGE)]).rename(folder / "x.warc.gz")
    pq.write_table(pa.table({"text": ["from a table"]}), folder / "t.parquet")
    (folder / "j.jsonl").write_text('{"text": "from lines"}\n')
    (folder / "p.py").write_text("x = 1\n")
    (tmp_path / "p.toml").write_text(f'input = ["{folder}"]\n')
    done = run_here("phi-train", "data", "run", tmp_path / "p.toml", "--out", tmp_path / "out", "--workers", 1)
    assert done.returncode == 0 and "4 documents are left" in done.stdout, done.stderr + done.stdout


def test_a_bad_row_of_parquet_does_not_end_the_file(tmp_path):
    raw = [b"text %d" % n for n in range(50)]
    raw[20] = b"\xff\xfe"
    column = pa.Array.from_buffers(pa.string(), 50, pa.array(raw, pa.binary()).buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    documents, unreadable = read(tmp_path / "a.parquet")
    assert len(documents) == 49 and [u.why for u in unreadable] == ["not UTF-8"]


def test_categories_of_parquet_are_texts(tmp_path):
    pq.write_table(pa.table({"text": pa.array(["a", "b", "a"]).dictionary_encode()}), tmp_path / "a.parquet")
    documents, _ = read(tmp_path / "a.parquet")
    assert [d.text for d in documents] == ["a", "b", "a"]


@pytest.mark.parametrize(("length", "why"), [("4000", "the archive ends within it"), ("-5", "does not say its length")])
def test_a_record_that_is_cut_is_no_document(tmp_path, length, why):
    record = "WARC/1.0\r\nWARC-Type: conversion\r\nContent-Type: text/plain\r\nContent-Length: {}\r\n\r\n{}\r\n\r\n"
    (tmp_path / "a.wet").write_text(record.format(5, "whole") + record.format(length, "half"), newline="")
    documents, unreadable = read(tmp_path / "a.wet")
    assert [d.text for d in documents] == ["whole"] and why in unreadable[0].why
