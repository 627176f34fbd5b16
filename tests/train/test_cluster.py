"""The files that start a recipe on a cluster, read by what reads them there: a real Slurm, Kubeflow's own models."""

import json
import os
import shutil
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from kubeflow_trainer_api.models import TrainerV1alpha1TrainJob
from support import SCRIPTS, settings

CLUSTER = Path(__file__).resolve().parents[2] / "train" / "cluster"


def test_kubeflow_reads_the_whole_job():
    written = yaml.safe_load((CLUSTER / "trainjob.yaml").read_text())
    assert TrainerV1alpha1TrainJob.from_dict(written).to_dict() == written  # a name that it does not know is left out


CONF = """
ClusterName=phi
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
SlurmctldPort={ports[0]}
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
ReturnToService=2
SwitchType=switch/none
MpiDefault=none
NodeName=node[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=1
PartitionName=all Nodes=ALL Default=YES State=UP
"""
_ROOT = hasattr(os, "geteuid") and os.geteuid() == 0


def _said(*command):
    return subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True).stdout


@pytest.fixture
def slurm(tmp_path, monkeypatch):
    """A Slurm of two nodes on this machine."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    port = min(port, 60_000)
    (tmp_path / "state").mkdir()
    conf = CONF.format(host=socket.gethostname().split(".")[0], folder=tmp_path, ports=range(port, port + 3))
    (tmp_path / "slurm.conf").write_text(conf)
    monkeypatch.setenv("SLURM_CONF", str(tmp_path / "slurm.conf"))
    if subprocess.run(["munge", "-n"], capture_output=True).returncode:
        Path("/run/munge").mkdir(exist_ok=True)
        shutil.chown("/run/munge", "munge")
        subprocess.run(["runuser", "-u", "munge", "--", "munged"], check=True)
    daemons = [["slurmctld", "-D"], *(["slurmd", "-D", "-N", f"node{n}"] for n in (1, 2))]
    running = [subprocess.Popen(d, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for d in daemons]
    end = time.monotonic() + 60
    while subprocess.run(["sinfo", "-h", "-t", "idle", "-o", "%D"], capture_output=True, text=True).stdout != "2\n":
        assert time.monotonic() < end and all(d.poll() is None for d in running)
        time.sleep(0.5)
    yield tmp_path
    subprocess.run(["scancel", "--state=RUNNING"])
    subprocess.run(["scancel", "--state=PENDING"])
    for daemon in reversed(running):
        daemon.terminate()
        daemon.wait(30)


@pytest.mark.integration
@pytest.mark.timeout(400)
@pytest.mark.skipif(not (_ROOT and shutil.which("slurmctld")), reason="Slurm and root")
def test_slurm_runs_it_and_queues_it_again_before_the_time_is_over(slurm, checkpoint, monkeypatch):
    training, out = checkpoint / "training", slurm / "out"
    data = (f"data.tokenizer={training / 'tokenizer'}", f"data.shards={training / 'shards'}")
    changes = settings("schedule.steps=100000", "save_every=100000", "data.batch_size=4", "samples=0", *data)
    monkeypatch.setenv("PHI_TRAIN", str(SCRIPTS / "phi-train"))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    command = ["--nodes", "2", "--gpus-per-node", "0", "--output", slurm / "said", CLUSTER / "slurm.sh"]
    _said("sbatch", "--test-only", *command, "phi3-demo", "--out", out)
    job = _said("sbatch", "--parsable", *command, "phi3-demo", "--out", out, *changes).strip()
    log, state = out / "training" / "log.jsonl", f"--jobs={job}"

    def until(what, seconds):
        end = time.monotonic() + seconds
        while not what():
            assert time.monotonic() < end, (slurm / "said").read_text()[-3000:]
            time.sleep(0.2)

    until(lambda: log.is_file() and len(log.read_text().splitlines()) > 3, 120)
    _said("scancel", "--batch", "--signal=TERM", job)  # as Slurm does five minutes before the end
    until(lambda: _said("squeue", "-h", state, "-o", "%T") == "PENDING\n", 60)
    assert "stopped by SIGTERM; the state is saved" in (slurm / "said").read_text()
    newest = max((out / "training" / "state").glob("step-*"))
    assert json.loads((newest / "state.json").read_text())["step"] > 3
    assert len(list(newest.glob("rank-*-of-00002.safetensors"))) == 2
