"""Engines in environments of their own: what happens without them, and what they measure."""

import shutil
import subprocess

import pytest
from support import run, settings

from phi_bench import figures
from phi_bench.adapters import NAMES, adapter
from phi_bench.peers import environments
from phi_bench.records import read_benchmark
from phi_runtime.errors import BenchmarkError

QUICK = ("--prompt-tokens", 16, "--decode-tokens", 4, "--rounds", 1)


@pytest.fixture
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_adapters_name_environments_that_there_are():
    wanted = {adapter(name).environment for name in NAMES} - {None}
    assert wanted == set(environments.PACKAGES)
    assert all(adapter(n).install == f"phi-bench build {adapter(n).environment}" for n in NAMES if n in wanted)


def test_not_built(empty_cache, bundles, tmp_path):
    done = run(
        "phi-bench", "run", bundles / "onnx", f"{bundles / 'onnx'}@optimum", *QUICK, "--out", tmp_path / "r.json"
    )
    assert done.returncode == 0, done.stderr
    ours, theirs = read_benchmark(tmp_path / "r.json").rows
    assert figures.good_runs(ours) and theirs.configuration.versions == {}
    (failed,) = theirs.runs
    assert failed.failure.reason == "not installed"
    assert "phi-bench build optimum" in failed.failure.detail


def test_other_versions_are_not_taken(empty_cache, monkeypatch):
    python = environments._folder("optimum") / "bin" / "python"
    python.parent.mkdir(parents=True)
    stamp = environments._folder("optimum") / "phi-edge-ready"
    stamp.write_text(environments._wanted("optimum"))
    assert environments.python_of("optimum") == python
    monkeypatch.setitem(environments.PACKAGES, "optimum", (("torch==1",),))
    with pytest.raises(BenchmarkError, match="phi-bench build optimum"):
        environments.python_of("optimum")


def test_a_package_that_cannot_be_had(empty_cache, monkeypatch):
    monkeypatch.setitem(environments.PACKAGES, "optimum", (("no-such-package-of-phi-edge",),))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(BenchmarkError, match="no-such-package-of-phi-edge cannot be installed"):
        environments.build("optimum")
    with pytest.raises(BenchmarkError, match="not installed"):
        environments.python_of("optimum")


@pytest.mark.clients
def test_openvino_and_optimum_are_measured(checkpoint, text, tmp_path):
    training = checkpoint / "training"
    more = (
        f"data.tokenizer={training / 'tokenizer'}",
        f"data.shards={training / 'shards'}",
        "model.num_key_value_heads=2",  # optimum 0.1.0 takes every phi3 for one without grouped queries
    )
    plain = tmp_path / "plain"
    assert run("phi-train", "phi3-demo", "--out", plain, *settings(*more)).returncode == 0
    assert run("phi-export", "--int4", "--fast", plain, "--out", tmp_path / "b", "--format", "onnx").returncode == 0
    folder = tmp_path / "plain-openvino"
    convert = environments.python_of("openvino").parent / "optimum-cli"
    how = ["--task", "text-generation-with-past", "--weight-format", "int8"]
    clean = tmp_path / "clean"
    shutil.copytree(plain, clean, ignore=shutil.ignore_patterns("training"))
    subprocess.run([convert, "export", "openvino", "--model", clean, *how, folder], check=True, capture_output=True)
    done = run(
        "phi-bench", "run", folder, f"{tmp_path / 'b/onnx'}@optimum", tmp_path / "b/onnx", *QUICK, "--depths", 40,
        "--against", plain, "--text", text, "--tokens", 300, "--out", tmp_path / "r.json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    openvino, optimum, ours = read_benchmark(tmp_path / "r.json").rows
    for row in (openvino, optimum):
        assert figures.good_runs(row), row.runs
        assert {figures.decode_depth(p) for p in row.runs[0].phases} == {1, 16, 40}
        assert row.configuration.versions
        assert 0 <= row.quality.kld_mean < 0.1
    assert openvino.configuration.versions["openvino-genai"]
    # The same file in the same engine, but for optimum's own float32 cache.
    assert optimum.quality.kld_mean == pytest.approx(ours.quality.kld_mean, rel=0.05)
