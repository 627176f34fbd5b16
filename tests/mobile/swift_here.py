"""Commands where Swift is (tools/swift.py), for tests."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "out/test-mobile"  # inside the repository: the Debian that Swift runs in sees nothing else


def call(*command, **variables):
    """Run a command in the repository's root; skips where there is no Swift."""
    tool = [sys.executable, ROOT / "tools/swift.py"]
    env = {**os.environ, **variables}
    done = subprocess.run([*tool, *map(str, command)], capture_output=True, text=True, env=env, check=False)
    if done.returncode == 3:
        pytest.skip(done.stderr.strip())
    return done


def swift(*command, **variables):
    """The same, of a command that has to succeed; what it printed."""
    done = call(*command, **variables)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def swift_test(*suites, **variables):
    """Run Swift's tests, those of these suites or all, with warnings as errors; what was printed."""
    filters = [part for suite in suites for part in ("--filter", suite)]
    return swift("swift", "test", "-Xswiftc", "-warnings-as-errors", *filters, **variables)


def manifest(contents, **changes):
    """A bundle's manifest that lists these files, by name, with their contents' sizes and digests; then `changes`."""
    good = json.loads((ROOT / "mobile/Tests/Golden/manifest.json").read_text())
    listed = [
        {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in contents.items()
    ]
    return json.dumps({**good, "files": listed, **changes}).encode()


def program():
    """The command phi-swift, built."""
    swift("swift", "build", "-c", "release")
    return ".build/release/phi-swift"


@contextmanager
def scratch(name):
    """An empty folder where Swift sees it."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


def is_bundle(folder, files):
    """Whether a folder holds these files and their manifest, and nothing else."""
    found = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    return found == {**files, "phi-bundle.json": manifest(files)}
