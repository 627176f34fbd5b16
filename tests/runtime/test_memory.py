"""What is predicted against what a process comes to. `phi-bench suite memory` does it for models of real size."""

import json
import shutil
import subprocess
import sys

import pytest

from phi_runtime.errors import ContextError, MemoryPlanError, UsageError
from phi_runtime.package.open import open_package
from phi_runtime.planning.available import available
from phi_runtime.planning.memory import DEVICES, parse_size, plan, predict, resident

_CHILD = """
import sys, phi_runtime
with phi_runtime.load(sys.argv[1], context=int(sys.argv[2]), kv=sys.argv[3]) as phi:
    phi.generate([5] * (phi.context - 8), max_tokens=8)
with open("/proc/self/status") as f:
    print(next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM:")))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the system says no peak")
@pytest.mark.parametrize(("name", "kv"), [("gguf", "f16"), ("gguf", "q8_0"), ("onnx", "f32"), ("mlx", "f32")])
def test_a_process_comes_to_what_was_predicted(name, kv, bundles):
    said = predict(open_package(bundles / name), "this machine", 96, kv, 1 << 40)
    command = [sys.executable, "-c", _CHILD, bundles / name, "96", kv]
    peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert abs(said.peak / peak - 1) < 0.2, (said, peak)  # almost all of it is the process here


def test_less_memory_means_a_smaller_cache_then_a_shorter_context(bundles):
    package = open_package(bundles / "gguf")
    whole = plan(bundles / "gguf")
    assert (whole.context, whole.kv) == (package.context, "f16") and whole.fits
    assert whole.peak == whole.weights + whole.cache + whole.buffers + whole.process
    less = plan(bundles / "gguf", memory=whole.peak - 1)
    assert less.context == whole.context and less.kv == "q8_0"
    with pytest.raises(MemoryPlanError, match=r"= \d+\.\d+ GB; 0\.001 GB allowed: does not fit"):
        plan(bundles / "gguf", memory=10**6)
    assert plan(bundles / "onnx", context=50).context == 50
    assert plan(bundles / "gguf", kv="q4_0").kv == "q4_0"


def test_what_cannot_be_planned(bundles):
    with pytest.raises(UsageError, match="iphone-14-pro"):
        plan(bundles / "gguf", device="toaster")
    with pytest.raises(UsageError, match="choose from f16"):
        plan(bundles / "gguf", kv="q1")
    with pytest.raises(ContextError):
        plan(bundles / "gguf", context=10**6)
    for bad in (0, -5, "2", "2 XB", "GB", "nan GB"):
        with pytest.raises(UsageError):
            plan(bundles / "gguf", memory=bad)
    assert plan(bundles / "gguf", device="laptop-8gb").limit == DEVICES["laptop-8gb"]


def test_sizes_of_this_machine():
    assert parse_size("1.5GiB") == 3 * 2**29
    assert resident() < available() < 2**50


def test_speed_is_what_this_machine_was_measured_at(bundles, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert plan(bundles / "gguf").tokens_per_second is None  # never measured here
    kinds = dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "Q5_K"), 0.07)
    table = {"machine": "this one", "engines": {"llama.cpp": kinds | {"Q4_K": 0.05, "Q8_0": 0.1, "Q6_K": 0.1}}}
    (tmp_path / "phi-edge").mkdir()
    (tmp_path / "phi-edge" / "speed.json").write_text(json.dumps(table))
    manifest = open_package(bundles / "gguf").manifest
    kinds = table["engines"]["llama.cpp"]
    used = [q for n, q in manifest.quantization.items() if q.type in kinds and n != "model.embed_tokens.weight"]
    expected = 1e9 / sum(kinds[q.type] * q.weights for q in used)
    assert plan(bundles / "gguf").tokens_per_second == pytest.approx(expected)
    shutil.copy(bundles / "gguf" / "model.gguf", tmp_path / "other.gguf")  # its types are in its head
    assert plan(tmp_path / "other.gguf").tokens_per_second == pytest.approx(expected)
    assert plan(bundles / "gguf", device="laptop-8gb").tokens_per_second is None
    assert plan(bundles / "onnx").tokens_per_second is None
    with pytest.raises(UsageError, match=r"choose from llama\.cpp"):
        plan(bundles / "gguf", backend="onnxruntime")
