"""`phi-swift fetch` against servers that drop, lie and change: the right folder, or an error and no folder."""

import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import numpy as np
import pytest
import swift_here
from swift_here import ROOT, call, swift_test

pytestmark = [pytest.mark.swift, pytest.mark.timeout(900)]
MODEL = np.random.default_rng(0).bytes(3_000_000)
FILES = {"model.gguf": MODEL, "sub/tokenizer.json": b"{}" * 700, "empty": b""}


def manifest(**changes):
    return swift_here.manifest(FILES, **changes)


class Server:
    """Its files under /bundle, and what it does wrong with the next answers for the model: one word each. Under another
    name it does what that says, always: /drops.
    """

    def __init__(self):
        self.files, self.tag, self.wrong, self.asked = {**FILES, "phi-bundle.json": manifest()}, '"v1"', [], []

    def answer(self, handler):
        _, place, name = unquote(handler.path).split("/", 2)
        self.asked.append((name, handler.headers.get("Range"), handler.headers.get("If-Range")))
        content = self.files.get(name)
        wrong = ""
        if name == "model.gguf":
            wrong = place if place != "bundle" else self.wrong.pop(0) if self.wrong else ""
        if content is None or wrong.isdigit():
            handler.send_response(int(wrong or 404))
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        start = 0
        if self.asked[-1][1] and self.asked[-1][2] == self.tag and wrong != "ignores ranges":
            start = int(self.asked[-1][1].removeprefix("bytes=").removesuffix("-"))
        handler.send_response(206 if start else 200)
        if start:
            said = start + 1 if wrong == "goes on elsewhere" else start
            handler.send_header("Content-Range", f"bytes {said}-{len(content) - 1}/{len(content)}")
        body = content[start:] + (b"more" if wrong == "sends too much" else b"")
        if wrong == "sends another file":
            body = bytes(len(body))
        length = len(body) + (1000 if wrong == "lies about the length" else 0)
        handler.send_header("ETag", self.tag)
        handler.send_header("Content-Length", str(length))
        handler.end_headers()
        handler.wfile.write(body[: len(body) // 2] if wrong == "drops" else body)


@pytest.fixture(scope="module", autouse=True)
def program():
    return swift_here.program()


@pytest.fixture
def place():
    with swift_here.scratch("download") as folder:
        yield folder / "bundle"


@contextmanager
def serving(server):
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            server.answer(self)

        def log_message(self, *_):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}/bundle"
    finally:
        http.shutdown()
        http.server_close()


def fetch(program, place, url, *before):
    """The name of the error, None for none."""
    done = call(*before, program, "fetch", place.relative_to(ROOT), "--from", url)
    assert done.returncode in (0, 2), done.stderr
    return None if done.returncode == 0 else done.stderr.split("error: ")[1].split(":")[0]


def holds_all(place):
    return swift_here.is_bundle(place, FILES) and [p.name for p in place.parent.iterdir()] == ["bundle"]


def test_a_bundle_arrives(program, place):
    server = Server()
    with serving(server) as url:
        assert fetch(program, place, url) is None
        assert holds_all(place)
        assert fetch(program, place, url) == "OutputExistsError"


def test_what_broke_off_goes_on(program, place):
    server = Server()
    server.wrong = ["drops"]
    with serving(server) as url:
        assert fetch(program, place, url) == "DownloadError"
        assert not place.exists()
        assert fetch(program, place, url) is None
    assert holds_all(place)
    assert ("model.gguf", f"bytes={len(MODEL) // 2}-", '"v1"') in server.asked


def test_the_manifest_counts_not_what_a_server_says_of_the_length(program, place):
    server = Server()
    server.wrong = ["lies about the length"]
    with serving(server) as url:
        assert fetch(program, place, url) is None
    assert holds_all(place)


@pytest.mark.parametrize("wrong", ["ignores ranges", "another version"])
def test_a_server_that_begins_again_is_believed(program, place, wrong):
    server = Server()
    server.wrong = ["drops", wrong]
    with serving(server) as url:
        assert fetch(program, place, url) == "DownloadError"
        server.tag = '"v2"' if wrong == "another version" else server.tag
        assert fetch(program, place, url) is None
    assert holds_all(place)


@pytest.mark.parametrize("wrong", ["goes on elsewhere", "416"])
def test_an_answer_that_does_not_fit_begins_again(program, place, wrong):
    server = Server()
    server.wrong = ["drops", wrong]
    with serving(server) as url:
        assert fetch(program, place, url) == "DownloadError"
        assert fetch(program, place, url) == "DownloadError"
        assert not place.exists()
        assert fetch(program, place, url) is None
    assert holds_all(place)


@pytest.mark.parametrize(
    ("wrong", "error"),
    [
        ("sends too much", "BundleError"),
        ("sends another file", "BundleError"),
        ("500", "DownloadError"),
        ("403", "DownloadError"),
    ],
)
def test_a_wrong_file_is_never_published(program, place, wrong, error):
    server = Server()
    server.wrong = [wrong]
    with serving(server) as url:
        assert fetch(program, place, url) == error
        assert not place.exists()
        assert fetch(program, place, url) is None
    assert holds_all(place)


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"<html>", "BundleError"),
        (b" " * (17 << 20), "BundleError"),
        (manifest(version=2), "BundleError"),
        (manifest(files=[{"path": "../x", "bytes": 1, "sha256": "0"}]), "BundleError"),
        (manifest(files=[{"path": "x", "bytes": 1 << 60, "sha256": "0"}]), "DiskFullError"),
    ],
)
def test_a_hostile_manifest(program, place, content, error):
    server = Server()
    server.files["phi-bundle.json"] = content
    with serving(server) as url:
        assert fetch(program, place, url) == error
    assert not place.exists() and not (place.parent / "x").exists()


def test_a_disk_that_fills_up(program, place):
    server = Server()
    limited = ["sh", "-c", 'trap "" XFSZ; ulimit -f 1000; exec "$@"', "sh"]
    with serving(server) as url:
        assert fetch(program, place, url, *limited) == "DiskFullError"
        assert not place.exists()
        assert fetch(program, place, url) is None
    assert holds_all(place)


def test_a_stop_in_the_middle(program):
    """In Swift's own test: stopped at the first bytes, then on to the end from there."""
    server = Server()
    with serving(server) as url:
        swift_test("PhiAppCoreTests.DownloadTests", PHI_TEST_URL=url)
    first, second = [where for name, where, _ in server.asked if name == "model.gguf"]
    assert first is None and second.startswith("bytes=")


def test_a_session_of_the_system(program):
    """In Swift's own tests, with a session that ends with the process: Linux has no other."""
    server = Server()
    with serving(server) as url:
        swift_test("PhiAppCoreTests.SystemDownloadTests", PHI_TEST_SYSTEM=url)


def test_no_server(program, place):
    assert fetch(program, place, "http://127.0.0.1:1/bundle") == "DownloadError"
    assert fetch(program, place, "file:///etc") == "UsageError"
