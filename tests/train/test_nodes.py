"""Training on two hosts, which are network namespaces here: the same losses, and what a killed host leaves."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from support import SCRIPTS, run, settings

sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))

from two_nodes import NAMES, ssh_servers, start, start_by_ssh, two_hosts

SMALL = (
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.num_hidden_layers=2",
    "data.sequence_length=48",
    "data.batch_size=8",
    "schedule.steps=200",
    "save_every=50",
    "data.eval_windows=2",
    "schedule.warmup_steps=2",
    "parallelism.precision=fp32",
    "samples=0",
)


def _has_namespaces():
    if sys.platform != "linux" or shutil.which("ip") is None or os.geteuid() != 0:
        return False
    try:
        with two_hosts():
            return True
    except subprocess.CalledProcessError:
        return False


pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(600),
    pytest.mark.skipif(not _has_namespaces(), reason="network namespaces take root on Linux"),
]


@pytest.fixture(scope="module")
def command(checkpoint):
    training = checkpoint / "training"
    data = (f"data.tokenizer={training / 'tokenizer'}", f"data.shards={training / 'shards'}")

    def made(out, *changes):
        return [str(SCRIPTS / "phi-train"), "phi3-demo", "--out", str(out), *settings(*SMALL, *data, *changes)]

    return made


@pytest.fixture(scope="module")
def alone(command, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "run"
    done = run(*command(out), timeout=300)
    assert done.returncode == 0, done.stderr
    return losses(out)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "training" / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def hosts():
    started = []

    def both(arguments, elastic=False):
        for host in (0, 1):
            log = subprocess.DEVNULL if host else subprocess.PIPE
            started.append(start(host, arguments, elastic, stdout=subprocess.DEVNULL, stderr=log))
        return started

    with two_hosts():
        yield both
        for process in started:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_hosts_learn_as_one(stage, tmp_path, command, alone, hosts):
    first, second = hosts(command(tmp_path / "two", f"parallelism.zero_stage={stage}"))
    said = first.communicate(timeout=400)[1]
    assert first.returncode == 0 and second.wait(60) == 0, said[-3000:]
    assert len(alone) == 200 and np.abs(np.subtract(losses(tmp_path / "two"), alone)).max() < 1e-3


@pytest.mark.skipif(not (shutil.which("pdsh") and Path("/usr/sbin/sshd").exists()), reason="pdsh and a server for ssh")
def test_deepspeeds_launcher_reaches_both_by_ssh(tmp_path, command, alone):
    keys, out = tmp_path / "keys", tmp_path / "run"
    keys.mkdir()
    with two_hosts(), ssh_servers(keys) as path:
        started = start_by_ssh(keys, path, command(out, "parallelism.zero_stage=1"), stdout=-1, stderr=-2)
        said = started.communicate(timeout=400)[0]
    assert started.returncode == 0, said[-3000:]
    assert len(losses(out)) == 200 and np.abs(np.subtract(losses(out), alone)).max() < 1e-3


def _kill(process):
    """A host as a power cut leaves it: everything on it is gone at once."""
    pids = subprocess.run(["ip", "netns", "pids", NAMES[1]], capture_output=True, text=True, check=True).stdout.split()
    for pid in {*map(int, pids), process.pid}:
        os.kill(pid, signal.SIGKILL)


def _until(path, processes):
    end = time.monotonic() + 200
    while not path.exists():
        assert all(p.poll() is None for p in processes) and time.monotonic() < end
        time.sleep(0.05)


def test_when_a_host_is_killed_the_other_goes_on(tmp_path, command, alone, hosts):
    out = tmp_path / "run"
    both = hosts(command(out, "parallelism.zero_stage=2"), elastic=True)
    _until(out / "training" / "state" / "step-00000050", both)
    _kill(both[1])
    said = both[0].communicate(timeout=300)[1]
    assert both[0].returncode == 0, said[-3000:]
    assert len(losses(out)) == 200 and np.abs(np.subtract(losses(out), alone)).max() < 1e-3


def test_without_elasticity_it_ends_and_one_host_goes_on(tmp_path, command, alone, hosts):
    out = tmp_path / "run"
    both = hosts(command(out, "parallelism.zero_stage=3"))
    _until(out / "training" / "state" / "step-00000050", both)
    _kill(both[1])
    began = time.monotonic()
    both[0].communicate(timeout=100)
    assert both[0].returncode != 0 and time.monotonic() - began < 60
    done = run(*command(out, "parallelism.zero_stage=3"), timeout=300)
    assert done.returncode == 0, done.stderr
    assert len(losses(out)) == 200 and np.abs(np.subtract(losses(out), alone)).max() < 1e-3
