"""The scripts that compare with others: each imports what it uses and says what it takes."""

import subprocess
import sys

import pytest
from support import ROOT

SCRIPTS = sorted(p for p in (ROOT / "bench" / "rivals").glob("*.py") if p.name != "runs.py")  # what the others share


@pytest.mark.integration
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda p: p.stem)
def test_it_starts(script):
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr[-500:]
