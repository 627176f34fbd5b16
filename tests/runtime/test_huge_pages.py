"""Weights lie in huge pages from the first, where the system has them."""

import subprocess
import sys
from pathlib import Path

import pytest

from phi_runtime.backends import huge_pages

THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")
pytestmark = pytest.mark.skipif(
    not THP.is_file() or "[never]" in THP.read_text(), reason="this system has no transparent huge pages"
)

CHILD = """
import ctypes, mmap
from phi_runtime.backends.huge_pages import when_allocated
size = 64 << 20
said = when_allocated(lambda f: f)
block = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)

if {ask}:
    assert said(0.0, None) is True
for at in range(0, size, 4096):
    block[at] = 1
with open("/proc/self/smaps_rollup") as f:
    print(next(int(line.split()[1]) * 1024 for line in f if line.startswith("AnonHugePages:")))
"""


def huge(ask):
    done = subprocess.run([sys.executable, "-c", CHILD.format(ask=ask)], capture_output=True, text=True, check=True)
    return int(done.stdout)


def test_memory_that_comes_after_is_huge():
    assert huge(ask=True) > 48 << 20


@pytest.mark.skipif("[always]" in (THP.read_text() if THP.is_file() else ""), reason="all memory is, on this system")
def test_nothing_is_without_asking():
    assert huge(ask=False) < 16 << 20


def test_only_new_and_large_pieces_are_asked_for(monkeypatch):
    asked = []
    pieces = [(0, 1 << 30), (1 << 40, (1 << 40) + 4096)]
    monkeypatch.setattr(huge_pages, "_pieces", lambda: iter(pieces))
    monkeypatch.setattr(huge_pages, "_madvise", lambda start, size: asked.append(start) is None)
    said = huge_pages.when_allocated(lambda f: f)
    pieces.append((1 << 45, (1 << 45) + (3 << 30)))
    pieces += [(1 << 50, (1 << 50) + (1 << 25)), (1 << 51, (1 << 51) + 4096)]
    assert said(0.0, None) and said(0.5, None)
    assert asked == [1 << 50]


def test_a_system_without_is_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert huge_pages.advise() == 0
