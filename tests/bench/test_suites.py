"""The suites: each imports what it uses and says what it takes; numbers of theirs stand in the documentation."""

import pytest
from support import ROOT, run_here

from phi_bench.suites import SUITES


@pytest.mark.integration
@pytest.mark.parametrize("name", SUITES)
def test_it_starts(name):
    done = run_here("phi-bench", "suite", name, "--help")
    assert done.returncode == 0 and f"phi-bench suite {name}" in done.stdout, done.stderr[-500:]


def test_every_module_is_listed():
    modules = {p.stem for p in (ROOT / "bench" / "phi_bench" / "suites").glob("*.py")} - {"__init__", "runs"}
    assert modules == {module for module, _ in SUITES.values()}


def test_they_are_listed_and_a_wrong_name_is_named():
    assert all(name in run_here("phi-bench", "suite").stdout for name in SUITES)
    done = run_here("phi-bench", "suite", "nonsense")
    assert done.returncode == 2
    assert "no suite 'nonsense'" in done.stderr
