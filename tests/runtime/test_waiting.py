"""How long threads spin: ours where nobody said, the user's own otherwise."""

import os

import pytest
from support import ROOT

import phi_runtime
from phi_runtime.backends import waiting

SPINS = "GOMP_SPINCOUNT"


@pytest.fixture(autouse=True)
def nothing_is_set(monkeypatch):
    for name in (SPINS, "OMP_WAIT_POLICY", "KMP_BLOCKTIME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(waiting, "_ours", None)


def test_it_holds_while_the_library_is_imported():
    with waiting.short_spins("300"):
        assert os.environ[SPINS] == "300"
    assert SPINS not in os.environ


def test_a_command_and_an_engine_have_their_own():
    waiting.spin_briefly("1000")
    with waiting.short_spins("300"):
        assert os.environ[SPINS] == "300"
    assert os.environ[SPINS] == "1000"


@pytest.mark.parametrize(("name", "value"), [(SPINS, "1000"), (SPINS, "7"), ("OMP_WAIT_POLICY", "ACTIVE")])
def test_what_the_user_set_is_left_alone(name, value, monkeypatch):
    monkeypatch.setenv(name, value)
    before = os.environ.get(SPINS)
    waiting.spin_briefly("1000")
    with waiting.short_spins("300"):
        assert os.environ.get(SPINS) == before


def test_the_documentation_has_these_values():
    page = (ROOT / "docs" / "explanation" / "busy-machine.md").read_text()
    for value in (waiting.TORCH, waiting.LLAMA_CPP, waiting.ONNXRUNTIME):
        assert f" | {value} |\n" in page


def test_onnxruntime_is_told(bundles):
    with phi_runtime.load(bundles / "onnx", context=64) as phi:
        options = phi.engine.backend._session.get_session_options()
        assert options.get_session_config_entry("session.intra_op.spin_duration_us") == waiting.ONNXRUNTIME
