"""What a container allows: read from cgroups of both versions, and held to by `load` before the kernel kills."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import phi_runtime
from phi_runtime.backends import open_backend
from phi_runtime.errors import MemoryPlanError
from phi_runtime.package.open import open_package
from phi_runtime.planning import available as module
from phi_runtime.planning.available import available, group_limit

GROUP = Path("/sys/fs/cgroup/memory/phi-edge-test")
IN_GROUP = """
import os, sys
open(sys.argv[1] + "/cgroup.procs", "w").write(str(os.getpid()))
import phi_runtime
with phi_runtime.load(sys.argv[2], context=96, kv='f16') as phi:
    phi.generate([5] * 80, max_tokens=8)
print("done")
"""


@pytest.fixture
def group(tmp_path, monkeypatch):
    """A tree like /sys/fs/cgroup; call it to say what is in it."""
    texts = {"/proc/self/status": "RssAnon:\t   1000 kB\n", "/proc/meminfo": "MemAvailable:   9000000 kB\n"}
    monkeypatch.setattr(module, "_CGROUPS", tmp_path)
    real = module._text
    monkeypatch.setattr(module, "_text", lambda path: texts.get(str(path)) or real(path))

    def put(own, **files):
        texts["/proc/self/cgroup"] = own
        for name, text in files.items():
            path = tmp_path / name.replace("__", "/").replace("_dot_", ".")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return put


def test_without_a_group_the_machine_counts(group):
    group("0::/\n")
    assert group_limit() is None
    assert available() == 9_000_000 * 1024


def test_version_2(group):
    group(
        "0::/app/web\n", app__web__memory_dot_max="2000000000\n", app__web__memory_dot_stat="anon 301024000\nfile 9\n"
    )
    assert group_limit() == 2_000_000_000 - (301_024_000 - 1000 * 1024)
    group(
        "0::/app/web\n", app__memory_dot_max="1000000000\n", app__memory_dot_stat="anon 1024000\n"
    )  # the group around it
    assert group_limit() == 1_000_000_000
    group("0::/app/web\n", app__memory_dot_max="max\n", app__web__memory_dot_max="max\n")
    assert group_limit() is None


def test_version_1(group):
    group(
        "4:memory:/job\n2:cpu:/\n0::/\n",
        memory__job__memory_dot_limit_in_bytes="1500000000\n",
        memory__job__memory_dot_stat="total_rss 1024000\n",
        memory__memory_dot_limit_in_bytes="9223372036854771712\n",
    )
    assert group_limit() == 1_500_000_000


def test_in_a_container_the_root_is_the_group(group):
    group("4:memory:/docker/abc\n", memory__memory_dot_limit_in_bytes="700000000\n")
    assert group_limit() == 700_000_000


def test_load_refuses_before_the_kernel_kills(bundles, monkeypatch):
    peak = phi_runtime.plan(bundles / "gguf", context=96, kv="f16").peak
    monkeypatch.setattr(phi_runtime.model, "group_limit", lambda: int(1.001 * peak))
    with phi_runtime.load(bundles / "gguf", context=96, kv="f16") as phi:
        assert phi.context == 96
    monkeypatch.setattr(phi_runtime.model, "group_limit", lambda: int(0.97 * peak))
    with pytest.raises(MemoryPlanError, match="does not fit"):
        phi_runtime.load(bundles / "gguf", context=96, kv="f16")


@pytest.mark.skipif(not os.access("/sys/fs/cgroup/memory", os.W_OK), reason="no cgroup of version 1 may be made here")
@pytest.mark.parametrize(("share", "done"), [(1.02, True), (0.97, False)])
def test_a_real_group(share, done, bundles):
    plan = phi_runtime.plan(bundles / "gguf", context=96, kv="f16")
    GROUP.mkdir(exist_ok=True)
    try:
        (GROUP / "memory.limit_in_bytes").write_text(str(int(share * plan.peak)))
        command = [sys.executable, "-c", IN_GROUP, str(GROUP), str(bundles / "gguf")]
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    finally:
        GROUP.rmdir()
    assert (ran.stdout.strip() == "done") == done, ran.stderr[-500:]
    if not done:
        assert "MemoryPlanError" in ran.stderr
        assert ran.returncode == 1  # ours, not the kernel's signal


@pytest.mark.parametrize("name", ["gguf", "onnx"])
def test_mapped_weights_give_the_same_logits(name, bundles):
    """What verification does where a cgroup leaves no room for a copy of the weights."""
    package = open_package(bundles / name)
    tokens = [5 + 7 * i for i in range(40)]
    plain, mapped = (open_backend(package, None, 64, 1, mapped=m) for m in (False, True))
    a, b = plain.forward(tokens, True), mapped.forward(tokens, True)
    assert np.abs(a - b).mean() < 0.05 * a.std()
    assert (a.argmax(-1) == b.argmax(-1)).mean() > 0.9
