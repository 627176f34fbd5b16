"""Commands where Swift is (tools/swift.py), for tests."""

import os
import subprocess
import sys
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
        pytest.skip(done.stdout.strip())
    return done


def swift(*command, **variables):
    """The same, of a command that has to succeed; what it printed."""
    done = call(*command, **variables)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout
