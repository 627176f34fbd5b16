"""Swift's import of a bundle from a folder or a zip archive: the right files or an error, never a broken bundle."""

import hashlib
import json
import os
import shutil
import socket
import stat
import struct
import subprocess
import sys
import zipfile
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import swift_here
from swift_here import ROOT, call, swift, swift_test

pytestmark = [pytest.mark.swift, pytest.mark.timeout(900)]
WORDS = b" ".join(f"{n * n % 977} word".encode() for n in range(60_000))
FILES = {
    "model.gguf": np.random.default_rng(0).bytes(700_000) + bytes(500_000),
    "sub/tokenizer.json": WORDS,
    "empty": b"",
    "x": b"x",
}


def manifest(files=FILES, **changes):
    return swift_here.manifest(files, **changes)


@pytest.fixture(scope="module", autouse=True)
def program():
    return swift_here.program()


@pytest.fixture
def place():
    with swift_here.scratch("import") as folder:
        yield folder


def take(program, place, source, *before):
    """The name of the error, None for none; nothing is left of one that failed."""
    done = call(
        *before, program, "import", (place / "bundle").relative_to(ROOT), "--from", (place / source).relative_to(ROOT)
    )
    assert done.returncode in (0, 2), done.stdout + done.stderr
    assert sorted(p.name for p in place.iterdir() if p.name != source and not p.name.startswith("source")) == (
        ["bundle"] if done.returncode == 0 else []
    )
    return None if done.returncode == 0 else done.stderr.split("error: ")[1]


def holds_all(place):
    return swift_here.is_bundle(place, FILES)


def write(path, method=zipfile.ZIP_DEFLATED, top="", level=None, more=(), files=FILES, said=None):
    with zipfile.ZipFile(path, "w", method, compresslevel=level) as z:
        for name, content in {**files, "phi-bundle.json": said or manifest()}.items():
            z.writestr(top + name, content)
        for name, content in more:
            z.writestr(name, content)


@pytest.mark.parametrize("level", [None, 1, 6, 9])
@pytest.mark.parametrize("top", ["", "gguf/", "a/b/"])
def test_archives(program, place, level, top):
    method = zipfile.ZIP_STORED if level is None else zipfile.ZIP_DEFLATED
    more = [("__MACOSX/._phi-bundle.json", b"x"), (top + ".DS_Store", b"y"), ("other/file", b"z")]
    write(place / "a.zip", method, top, level, more)
    assert take(program, place, "a.zip") is None
    assert holds_all(place / "bundle")


def test_an_archive_of_sizes_that_follow_and_one_of_zip64(program, place):
    """As programs write that do not go back in the file, and as those that may pass 4 GB."""
    with open(place / "a.zip", "wb") as f, zipfile.ZipFile(_Stream(f), "w", zipfile.ZIP_DEFLATED) as z:
        for name, content in {**FILES, "phi-bundle.json": manifest()}.items():
            with z.open(f"gguf/{name}", "w", force_zip64=True) as entry:
                entry.write(content)
    assert take(program, place, "a.zip") is None
    assert holds_all(place / "bundle")


class _Stream:
    """A file that cannot be sought in."""

    def __init__(self, f):
        self.write, self.flush = f.write, f.flush


def test_a_directory_of_zip64(program, place):
    write(place / "b.zip")
    raw = bytearray((place / "b.zip").read_bytes())
    end = raw.rindex(b"PK\5\6")
    count, size, offset = struct.unpack_from("<HII", raw, end + 10)
    record = struct.pack("<IQHHIIQQQQ", 0x06064B50, 44, 45, 45, 0, 0, count, count, size, offset)
    locator = struct.pack("<IIQI", 0x07064B50, 0, end, 1)
    last = struct.pack("<IHHHHIIH", 0x06054B50, 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (place / "a.zip").write_bytes(raw[:end] + record + locator + last)
    (place / "b.zip").unlink()
    assert zipfile.ZipFile(place / "a.zip").testzip() is None
    assert take(program, place, "a.zip") is None
    assert holds_all(place / "bundle")


def test_a_folder(program, place):
    for name, content in {**FILES, "phi-bundle.json": manifest(), "sub/stray": b"1"}.items():
        (place / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (place / "source" / name).write_bytes(content)
    assert take(program, place, "source") is None
    assert holds_all(place / "bundle")
    assert call(program, "import", (place / "bundle").relative_to(ROOT), "--from", "out").returncode == 2
    assert holds_all(place / "bundle")
    shutil.rmtree(place / "bundle")
    (place / "source/model.gguf").write_bytes(bytes(1_200_000))
    assert "sha256" in take(program, place, "source")
    (place / "source/model.gguf").unlink()
    (place / "source/model.gguf").symlink_to("/etc/passwd")
    assert "holds no 'model.gguf'" in take(program, place, "source")


def test_a_symbolic_link_and_hostile_names(program, place):
    link = zipfile.ZipInfo("model.gguf")
    link.create_system, link.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    write(place / "a.zip", files={"x": b"x"}, more=[(link, b"/etc/passwd")])
    assert "has a link" in take(program, place, "a.zip")
    for name in ("../evil", "/evil", "a/../../evil", "a\\..\\evil", "n" * 300):
        write(place / "a.zip", more=[(name, b"evil")])
        assert "leaves the folder" in take(program, place, "a.zip")
    with pytest.warns(UserWarning, match="Duplicate"):
        write(place / "a.zip", more=[("x", b"y")])
    assert "twice" in take(program, place, "a.zip")
    write(place / "a.zip", more=[("X", b"y")])
    assert "twice" in take(program, place, "a.zip")


def test_bombs(program, place):
    """What the manifest does not list is not unpacked, what it lists is unpacked up to its size."""
    write(place / "a.zip", more=[("bomb", bytes(300_000_000))])
    assert take(program, place, "a.zip") is None
    assert holds_all(place / "bundle")
    shutil.rmtree(place / "bundle")
    bomb = {"x": bytes(100_000_000)}
    write(place / "a.zip", files=bomb, said=manifest({"x": b"x"}))
    assert "has 100000000 bytes, the manifest says 1" in take(program, place, "a.zip")
    raw = bytearray((place / "a.zip").read_bytes())
    entry = raw.index(b"PK\1\2")
    struct.pack_into("<I", raw, entry + 24, 1)
    (place / "a.zip").write_bytes(raw)
    assert "larger than it says" in take(program, place, "a.zip")
    huge = json.loads(manifest({"x": b"x"}))
    huge["files"][0]["bytes"] = 1 << 50
    write(place / "a.zip", files={"x": b"x"}, said=json.dumps(huge).encode())
    assert "the manifest says" in take(program, place, "a.zip")
    write(place / "a.zip", files={}, said=b" " * (17 << 20))
    assert "manifest is too large" in take(program, place, "a.zip")


def test_a_full_disk(program, place):
    write(place / "a.zip")
    limited = ["sh", "-c", 'trap "" XFSZ; ulimit -f 1000; exec "$@"', "sh"]
    assert take(program, place, "a.zip", *limited).startswith("DiskFullError")
    assert take(program, place, "a.zip") is None


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (b"", "no zip archive"),
        (b"PK\5\6" + bytes(17), "no zip archive"),
        (b"PK\5\6" + bytes(18), "holds no phi-bundle.json"),
        (os.urandom(100_000), "no zip archive"),
    ],
)
def test_what_is_no_archive(program, place, content, why):
    (place / "a.zip").write_bytes(content)
    assert why in take(program, place, "a.zip")


def test_cut_and_flipped_archives(program, place):
    """Each is taken whole or refused; a flipped bit in what is not read may be either."""
    write(place / "b.zip", level=6)
    raw = (place / "b.zip").read_bytes()
    (place / "b.zip").unlink()
    random = np.random.default_rng(0)
    for _ in range(12):
        (place / "a.zip").write_bytes(raw[: int(random.integers(len(raw)))])
        assert take(program, place, "a.zip") is not None
    taken = 0
    for n in range(25):
        damaged = bytearray(raw)
        at = int(random.integers(len(raw) - 600, len(raw))) if n % 2 else int(random.integers(len(raw)))
        damaged[at] ^= 1 << int(random.integers(8))
        (place / "a.zip").write_bytes(damaged)
        if take(program, place, "a.zip") is None:
            assert holds_all(place / "bundle")
            shutil.rmtree(place / "bundle")
            taken += 1
    assert taken < 20


@pytest.mark.parametrize(
    "names",
    [
        ("../\u0301evil",), ("/\u0301x",), ("s\u0600/../\u0301e",), ("./x",), ("s//x",), ("s/./x",), ("a\nb\x1b[31m",),
        ("x", "x"), ("x", "X"), ("a", "a/b"), ("phi-bundle.json",), ("phi-bundle.json/x",),
    ],
)  # fmt: skip
def test_names_that_a_manifest_may_not_list(program, place, names):
    """Some are a path to the system that is none to a String, others cannot lie beside each other."""
    listed = [{"path": n, "bytes": 4, "sha256": hashlib.sha256(b"evil").hexdigest()} for n in names]
    (place / "source").mkdir()
    said = json.dumps({**json.loads(manifest({"x": b""})), "files": listed})
    (place / "source/phi-bundle.json").write_text(said)
    for name in {n for n in names if "phi-bundle.json" not in n and ".." not in n and n[0] != "/"}:
        path = place / "source" / name
        with suppress(OSError, ValueError):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(b"evil")
    before = {p for p in place.parent.rglob("*") if "source" not in p.parts}
    error = take(program, place, "source")
    assert error.startswith("BundleError") and error.count("\n") == 1 and "\x1b" not in error
    assert {p for p in place.parent.rglob("*") if "source" not in p.parts} == before


def test_names_of_our_own_files(program, place):
    """A bundle may hold what partial files were called, and names as long as systems allow."""
    files = {"a.part": b"1234", "a.etag": b"12", "a": b"12345678", "n" * 255: b"long"}
    write(place / "a.zip", files=files, said=manifest(files))
    assert take(program, place, "a.zip") is None
    assert {p.name: p.read_bytes() for p in (place / "bundle").iterdir()} == {
        **files,
        "phi-bundle.json": manifest(files),
    }


def test_sizes_near_the_largest_number(program, place):
    most = (1 << 63) - 1
    said = json.loads(manifest({"x": b"x"}))
    said["files"][0]["bytes"] = most
    write(place / "a.zip", files={"x": b"x"}, said=json.dumps(said).encode())
    raw = bytearray((place / "a.zip").read_bytes())
    at = raw.index(b"PK\1\2")
    raw[at + 24 : at + 28] = b"\xff" * 4
    struct.pack_into("<H", raw, at + 30, 12)
    raw[at + 47 : at + 47] = struct.pack("<HHQ", 1, 8, most)
    end = raw.rindex(b"PK\5\6")
    struct.pack_into("<I", raw, end + 12, struct.unpack_from("<I", raw, end + 12)[0] + 12)
    (place / "a.zip").write_bytes(raw)
    assert take(program, place, "a.zip").startswith("DiskFullError")


@pytest.mark.parametrize("what", ["manifest", "method", "encrypted", "behind", "count"])
def test_archives_that_contradict_themselves(program, place, what):
    write(place / "a.zip", zipfile.ZIP_STORED if what == "manifest" else zipfile.ZIP_DEFLATED, files={"x": b"x" * 99},
          said=manifest({"x": b"x" * 99}))  # fmt: skip
    raw = bytearray((place / "a.zip").read_bytes())
    if what == "manifest":
        raw[raw.index(b'"name": "') + 9] ^= 1
    if what == "method":
        raw[8] = 99
    if what == "encrypted":
        raw[6] |= 1
    if what == "behind":  # bytes behind the last block of the stream
        size = struct.unpack_from("<I", raw, 18)[0]
        raw[31 + size : 31 + size] = b"more"
        at = raw.index(b"PK\1\2")
        struct.pack_into("<I", raw, at + 20, size + 4)
        second = raw.index(b"PK\1\2", at + 1)
        struct.pack_into("<I", raw, second + 42, struct.unpack_from("<I", raw, second + 42)[0] + 4)
        end = raw.rindex(b"PK\5\6")
        struct.pack_into("<I", raw, end + 16, struct.unpack_from("<I", raw, end + 16)[0] + 4)
    if what == "count":
        end = raw.rindex(b"PK\5\6")
        struct.pack_into("<HH", raw, end + 8, 60000, 60000)
    (place / "a.zip").write_bytes(raw)
    assert take(program, place, "a.zip").startswith("BundleError")


def test_what_is_no_file(program, place):
    os.mkfifo(place / "a.zip")
    assert "is no file" in take(program, place, "a.zip")


def test_two_bundles_in_one_archive(program, place):
    write(place / "a.zip", top="one/", more=[("two/phi-bundle.json", manifest())])
    assert "holds 2 bundles" in take(program, place, "a.zip")


def test_the_library_takes_an_archive(place):
    """In Swift's own tests: taken twice at once, again, stopped, removed."""
    write(place / "gguf.zip", top="gguf/")
    source = str((place / "gguf.zip").relative_to(ROOT))
    swift_test("LibraryTests", PHI_TEST_IMPORT=source)


def test_a_result_is_handed_over(program, place, tmp_path):
    """To phi-bench collect, with its code; a second time, and with another code, it is refused."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    result = ROOT / "docs/benchmark/sample.json"
    shutil.copy(result, place / "source.json")
    command = [Path(sys.executable).with_name("phi-bench"), "collect", "--out", tmp_path, "--host", "127.0.0.1"]
    with subprocess.Popen([*command, "--port", str(port)], stdout=subprocess.PIPE, text=True) as door:
        said = next(line for line in door.stdout if line.startswith("scan, or POST"))
        link = next(word for word in said.split() if word.startswith("phi-edge://"))
        relative = str((place / "source.json").relative_to(ROOT))
        wrong = call(program, "send", relative, "--to", link[:-1] + ("0" if link[-1] != "0" else "1"))
        assert wrong.returncode == 2 and "the code is wrong" in wrong.stderr
        assert "taken as a result of" in swift(program, "send", relative, "--to", link)
        assert door.wait(30) == 0
    again = call(program, "send", relative, "--to", link)
    assert again.returncode == 2 and "nobody answers" in again.stderr
    assert len(list(tmp_path.rglob("*.json"))) == 1
