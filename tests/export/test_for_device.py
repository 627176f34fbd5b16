"""`phi-export --for DEVICE`: int4 where it fits, a smaller mix where it does not, a refusal with the arithmetic."""

import pytest
from support import run, run_here

from phi_export.for_device import plan_for
from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.errors import UsageError
from phi_runtime.package.manifest import read_manifest
from phi_runtime.package.open import open_package
from phi_runtime.planning import memory

pytestmark = pytest.mark.integration


@pytest.fixture
def device(monkeypatch):
    """Set what a device allows."""

    def allows(size):
        monkeypatch.setitem(memory.DEVICES, "iphone-14-pro", size)

    return allows


def test_int4_where_it_fits(checkpoint):
    found = plan_for(open_checkpoint(checkpoint), "iphone-14-pro")
    assert found.budget.memory is None
    assert (found.memory.context, found.memory.kv) == (100, "q8_0")  # all that the model has
    assert found.memory.fits


def test_a_smaller_mix_where_it_does_not(checkpoint, device):
    whole = plan_for(open_checkpoint(checkpoint), "iphone-14-pro").memory
    device(int((whole.peak - whole.weights // 10) / 0.94))
    found = plan_for(open_checkpoint(checkpoint), "iphone-14-pro")
    assert found.budget.memory is not None
    assert found.memory.weights < whole.weights
    assert found.memory.fits and found.memory.context == whole.context


def test_what_cannot_fit_is_refused(checkpoint, device):
    device(50_000_000)
    with pytest.raises(UsageError, match=r"does not fit; no mix"):
        plan_for(open_checkpoint(checkpoint), "iphone-14-pro")
    with pytest.raises(UsageError, match="no device"):
        plan_for(open_checkpoint(checkpoint), "iphone-1")


def test_the_bundle_and_its_readme(checkpoint, tmp_path):
    out = tmp_path / "phone"
    done = run("phi-export", "--for", "iphone-14-pro", "--fast", checkpoint, "--out", out)
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in out.iterdir()) == ["README.md", "gguf"]
    assert read_manifest(out / "gguf").self_test is not None
    text = (out / "README.md").read_text()
    assert "options.context = 100" in text and "options.cache = .q8_0" in text and "options.memory = 2867000000" in text
    said = memory.predict(open_package(out / "gguf"), "", 100, "q8_0", 1 << 40)
    assert f"= {said.peak / 1e9:.3f} GB" in text


@pytest.mark.parametrize("more", [["--int4"], ["--memory", "1GB"], ["--format", "onnx"], ["--context", "64"]])
def test_it_goes_alone(checkpoint, tmp_path, more):
    done = run_here("phi-export", "--for", "iphone-14-pro", checkpoint, "--out", tmp_path / "x", *more)
    assert done.returncode == 2
    assert "one of them" in done.stderr or "goes without" in done.stderr
