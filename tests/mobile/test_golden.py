"""The cases that Swift is held to are what Python answers today."""

import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "mobile/Tests/Golden"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("golden")
    before, sys.argv = sys.argv, ["golden.py", str(folder)]
    try:
        runpy.run_path(str(ROOT / "tools/golden.py"), run_name="__main__")
    finally:
        sys.argv = before
    return folder


def test_golden_files_are_todays(made):
    names = {p.name for p in GOLDEN.glob("*.json")} - {"manifest.json"}
    assert {p.name for p in made.glob("*.json")} == names
    for name in sorted(names):
        assert (made / name).read_text() == (GOLDEN / name).read_text(), f"{name}: run python tools/golden.py"


def test_they_are_small():
    assert sum(p.stat().st_size for p in GOLDEN.rglob("*") if p.is_file()) < 700_000
