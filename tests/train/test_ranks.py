"""Many processes, ZeRO's stages, and what a run survives."""

import collections
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack

import numpy as np
import psutil
import pytest
from support import SCRIPTS, kill_all, run, settings

from phi_runtime.errors import UsageError
from phi_train.recipes.catalogue import get_recipe
from phi_train.recipes.config import vary
from phi_train.trainer import engine, setup
from phi_train.trainer.loop import _number, learning_rate, train
from phi_train.trainer.setup import check_disk, claim, hold

pytestmark = pytest.mark.integration

SMALL = (
    "model.hidden_size=64",
    "model.intermediate_size=128",
    "model.num_hidden_layers=2",
    "data.sequence_length=48",
    "data.batch_size=8",
    "schedule.steps=16",
    "save_every=4",
    "data.eval_windows=2",
    "schedule.warmup_steps=2",
    "parallelism.precision=fp32",
)

_TALKATIVE = {**os.environ, "PYTHONFAULTHANDLER": "1"}  # a crash outside Python says where


@pytest.fixture
def common(checkpoint):
    training = checkpoint / "training"
    return (*SMALL, f"data.tokenizer={training / 'tokenizer'}", f"data.shards={training / 'shards'}")


def command(ranks, out, changes):
    launcher = [SCRIPTS / "torchrun", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    return [*launcher, SCRIPTS / "phi-train", "phi3-demo", "--out", out, *settings(*changes)]


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "training" / "log.jsonl").read_text().splitlines()]


@pytest.fixture
def alone(tmp_path, common):
    done = run(*command(1, tmp_path / "alone", common))
    assert done.returncode == 0, done.stderr
    return losses(tmp_path / "alone")


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_processes_learn_as_one(stage, tmp_path, common, alone):
    done = run(
        *command(2, tmp_path / "two", (*common, f"parallelism.zero_stage={stage}", "parallelism.micro_batch_size=2")),
        env=_TALKATIVE,
    )
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("held-out loss") == 1
    assert np.abs(np.subtract(losses(tmp_path / "two"), alone)).max() < 1e-4
    assert alone[-1] < alone[0] - 0.5


@pytest.mark.parametrize("stage", [2, 3])
def test_killed_on_two_processes_it_goes_on_with_one(stage, tmp_path, common, alone):
    out = tmp_path / "broken"
    changes = (*common, f"parallelism.zero_stage={stage}")
    process = subprocess.Popen(command(2, out, changes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "training" / "state" / "step-00000008").exists() and process.poll() is None:
        time.sleep(0.02)
    kill_all(process)
    assert not (out / "config.json").exists(), "it ended before it could be killed"
    done = run(*command(1, out, changes))
    assert done.returncode == 0, done.stderr
    assert len(losses(out)) == 16
    assert np.abs(np.subtract(losses(out), alone)).max() < 1e-4


def test_any_number_and_stage_goes_on_from_the_state_of_another(tmp_path, common, alone):
    begun = tmp_path / "begun"
    process = subprocess.Popen(command(2, begun, (*common, "parallelism.zero_stage=3")), stderr=subprocess.DEVNULL)
    state = begun / "training" / "state"
    while not (state / "step-00000008").exists() and process.poll() is None:
        time.sleep(0.02)
    kill_all(process)
    written = sorted(p.name for p in sorted(state.glob("step-*"))[-1].glob("rank-*"))
    assert written == [f"rank-0000{rank}-of-00002.safetensors" for rank in (0, 1)]
    for ranks, stage in ((1, 0), (2, 1), (4, 2), (4, 3)):
        out = tmp_path / f"{ranks}-{stage}"
        shutil.copytree(begun, out)
        done = run(*command(ranks, out, (*common, f"parallelism.zero_stage={stage}")))
        assert done.returncode == 0, done.stderr[-3000:]
        assert np.abs(np.subtract(losses(out), alone)).max() < 1e-4


def test_processes_whose_launcher_is_killed_save_and_leave(tmp_path, common, alone):
    """torchrun gives each a session of its own, so that nothing else ends them."""
    out = tmp_path / "out"
    launcher = subprocess.Popen(command(2, out, (*common, "save_every=1000")), stderr=subprocess.DEVNULL)
    log = out / "training" / "log.jsonl"
    while not (log.is_file() and log.read_text()) and launcher.poll() is None:
        time.sleep(0.02)
    workers = psutil.Process(launcher.pid).children()
    for worker in workers:
        worker.suspend()  # or they are done too soon
    launcher.kill()
    launcher.wait()
    time.sleep(1)
    for worker in workers:
        worker.resume()
    assert len(workers) == 2 and not psutil.wait_procs(workers, timeout=60)[1]
    saved = sorted(p.name for p in (out / "training" / "state").iterdir())
    assert not (out / "config.json").exists() and saved[-1] > "step-00000000"
    done = run(*command(1, out, (*common, "save_every=1000")))
    assert done.returncode == 0, done.stderr
    assert np.abs(np.subtract(losses(out), alone)).max() < 1e-4


@pytest.mark.parametrize("ends", [True, False])
def test_a_folder_that_another_run_is_writing(ends, tmp_path, common, monkeypatch):
    """A second run waits for a while, for its end or to be told so."""
    monkeypatch.setattr(setup, "_PATIENCE", 20.0 if ends else 1.0)
    out = tmp_path / "out"
    recipe = get_recipe("phi3-demo", [*common])
    claim(recipe, out)
    said = []
    with ExitStack() as other:
        other.enter_context(hold(out, said.append))
        if ends:
            threading.Timer(2, other.close).start()
            with hold(out, said.append):
                pass
        else:
            with pytest.raises(UsageError, match="out: another run is writing it; wait for its end, or choose"):
                train(recipe, out, lambda what, *_: said.append(what))
            assert not (out / "training" / "log.jsonl").exists()
    assert f"{out}: another run is writing it, waiting {setup._PATIENCE:.0f} s for its end" in said


def test_a_state_that_does_not_fit_on_the_disk_is_named(tmp_path, common):
    out = tmp_path / "out"
    arguments = shlex.join(str(a) for a in command(1, out, common))
    done = subprocess.run(["bash", "-c", f"ulimit -f 100; exec {arguments}"], capture_output=True, text=True)
    assert done.returncode == 2 and "the disk is full" in done.stderr, done.stderr
    assert run(*command(1, out, common)).returncode == 0 and len(losses(out)) == 16


_LONELY = """
import datetime, sys
import phi_train.trainer.engine as engine
from phi_train.cli import main
engine._PATIENCE = datetime.timedelta(seconds=3)
sys.argv = ["phi-train", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_a_host_that_is_not_reached_is_named(rank, tmp_path, common):
    """The first waits for a second, the second does not find the first."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": str(rank)}
    arguments = [str(a) for a in command(1, tmp_path / "out", common)[1:]]
    done = subprocess.run(
        [sys.executable, "-c", _LONELY, *arguments], env=os.environ | place, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 2, done.stderr[-2000:]
    assert f"process {rank} waited 3 s for all 2 to meet at 127.0.0.1:{port}" in done.stderr
    assert not (tmp_path / "out").exists()


def test_one_that_waits_for_another_says_where_and_can_be_ended(tmp_path, common):
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9", "WORLD_SIZE": "2", "RANK": "1"}
    arguments = command(1, tmp_path / "out", common)
    with subprocess.Popen(arguments, env=os.environ | place, stderr=subprocess.PIPE, text=True) as process:
        said = next(line for line in process.stderr if "meets" in line)
        assert "process 1 of 2 meets the others at 127.0.0.1:9" in said
        time.sleep(2)
        process.terminate()
        try:
            assert process.wait(10) == -signal.SIGTERM
        finally:
            process.kill()
    assert not (tmp_path / "out").exists()


def test_deepspeeds_launcher_says_how_many_share_a_host(monkeypatch):
    monkeypatch.setattr(engine.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(engine.torch, "set_num_threads", lambda n: None)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setenv("LOCAL_SIZE", "8")
    assert engine.join().local_world == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert engine.join().local_world == 4


def test_hosts_that_do_not_share_the_folder_are_named(tmp_path, common):
    (first, one), (second, two) = side_by_side([command(1, tmp_path / name, common) for name in "ab"])
    assert first == second == 2
    assert "process 1 does not see it; put --out in a folder that all hosts share" in two, one + two


@pytest.mark.parametrize(
    "ways",
    [
        {"zero_stage": 1, "weights": "bf16", "precision": "bf16"},
        {"zero_stage": 3, "weights": "bf16", "precision": "bf16"},
        {"compile": "true"},
        {"zero_stage": 3, "gradient_checkpointing": "selective"},
    ],
    ids=["bf16-1", "bf16-3", "compiled", "selective-3"],
)
@pytest.mark.timeout(900)  # a processor without bf16 takes twenty times as long for it
def test_other_arithmetic_learns_the_same_and_goes_on_exactly(ways, tmp_path, common, alone):
    """Of bf16 weights the float32 copy is what is kept: a run that was stopped ends in the same bytes."""
    changes = (*common, *(f"parallelism.{name}={value}" for name, value in ways.items()))
    done = run(*command(1, tmp_path / "whole", changes))
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.abs(np.subtract(losses(tmp_path / "whole"), alone)).max() < 0.05
    process = subprocess.Popen(
        command(1, tmp_path / "broken", changes), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while not (tmp_path / "broken" / "training" / "state" / "step-00000008").exists() and process.poll() is None:
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert not (tmp_path / "broken" / "config.json").exists(), "it ended before it could be killed"
    assert run(*command(1, tmp_path / "broken", changes)).returncode == 0
    assert losses(tmp_path / "broken") == losses(tmp_path / "whole")
    both = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    assert both[0] == both[1]


def side_by_side(commands, **more):
    """Two processes that meet, each by a command of its own."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = [
        subprocess.Popen(
            [str(part) for part in each],
            env=os.environ | place | {"RANK": str(rank), "LOCAL_RANK": "0"} | more,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, each in enumerate(commands)
    ]
    return [(p.returncode, said) for p, said in [(p, p.communicate(timeout=200)[1]) for p in processes]]


def test_a_host_with_another_recipe_or_other_data(tmp_path, common, tokenizer_and_other_data):
    cases = {"recipe": (*common, "optimizer.lr=0.5"), "data": (*common, f"data.shards={tokenizer_and_other_data}")}
    for what, other in cases.items():
        out = tmp_path / what
        (first, said), (second, its) = side_by_side([command(1, out, common), command(1, out, other)])
        assert first == 2 and f"process 1 has another {what} than process 0" in said, said[-2000:]
        assert second == 2, its[-2000:]
        assert not (out / "training" / "state").exists()


@pytest.fixture
def tokenizer_and_other_data(tmp_path, checkpoint):
    """Shards by the checkpoint's tokenizer, of another corpus."""
    (tmp_path / "corpus").mkdir()
    for n in range(60):
        (tmp_path / "corpus" / f"{n}.txt").write_text("\n".join(f"def f{n}{m}(x): return x * {m}" for m in range(90)))
    tokenizer = checkpoint / "training" / "tokenizer"
    made = run(
        "phi-train", "shards", "--corpus", tmp_path / "corpus", "--tokenizer", tokenizer, "--out", tmp_path / "other"
    )
    assert made.returncode == 0, made.stderr
    return tmp_path / "other"


def test_too_little_disk(tmp_path, common, monkeypatch):
    full = collections.namedtuple("usage", "total used free")(10**9, 10**9, 10**5)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: full)
    with pytest.raises(UsageError, match=r"GB on disk \(3 states of .*0\.0 GB are free; choose another --out"):
        check_disk(get_recipe("phi3-demo", []), 10**6, 10**6, tmp_path / "not" / "there")
    monkeypatch.undo()
    check_disk(get_recipe("phi3-demo", []), 10**3, 10**3, tmp_path)


def test_a_batch_that_does_not_divide(tmp_path, common):
    done = run(*command(2, tmp_path / "out", (*common, "data.batch_size=7")))
    assert done.returncode != 0
    assert "batch_size 7 does not divide among 2 processes" in done.stderr
    assert not (tmp_path / "out").exists()


def test_sigterm_saves_and_leaves(tmp_path, common):
    out = tmp_path / "out"
    changes = (*common, "schedule.steps=4000", "save_every=100000")
    process = subprocess.Popen(command(1, out, changes), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    log = out / "training" / "log.jsonl"
    while not (log.is_file() and len(log.read_text().splitlines()) > 3) and process.poll() is None:
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    said = process.communicate(timeout=60)[1]
    assert process.returncode == 143, said
    newest = sorted((out / "training" / "state").glob("step-*"))[-1]
    saved = json.loads((newest / "state.json").read_text())
    assert saved["step"] == len(losses(out)) > 3
    assert saved["recent"] == pytest.approx(losses(out)[-20:], abs=1e-6)  # what the next loss is compared with


_SPOIL = """
import sys, torch
import phi_train.trainer.loop as loop
from phi_train.cli import main
real = loop._Run._loss
calls, what = 0, sys.argv[1]
def spoilt(self, *arguments, **options):
    global calls
    loss = real(self, *arguments, **options)
    if self.engine.module.training:
        calls += 1
        if calls == 7 and what == "loss":
            loss = loss * float("nan")
        if calls == 7 and what == "spike":
            loss = loss * 10
        if calls == 7 and what == "weights":
            loss.register_hook(lambda g: g * float("nan"))
        if what == "always" and calls > 6:
            loss = loss * float("nan")
        if what == "phase" and calls > 8:
            loss = loss * 10
    return loss
loop._Run._loss = spoilt
loop._RECENT = 5
sys.argv = ["phi-train", *sys.argv[2:]]
main()
"""


@pytest.mark.parametrize(("what", "skipped"), [("loss", [6]), ("spike", [6]), ("weights", [6, 7]), ("always", None)])
def test_a_batch_that_goes_wrong_is_left_out(what, skipped, tmp_path, common):
    out = tmp_path / "out"
    arguments = [str(a) for a in command(1, out, (*common, "save_every=100"))[1:]]
    done = subprocess.run([sys.executable, "-c", _SPOIL, what, *arguments], capture_output=True, text=True)
    if what == "always":
        assert done.returncode == 2
        assert "11 batches went wrong" in done.stderr and "lower optimizer.lr" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert f"batch {6 if what != 'weights' else 7} is left out" in done.stderr
    assert ("back to step 0" in done.stderr) == (what == "weights")
    found = losses(out)
    assert len(found) == 16 and np.isfinite(found).all() and max(found) < 9


def test_a_second_phase_may_have_other_losses(tmp_path, common, checkpoint):
    phase = ("data.phase2_step=8", f"data.phase2_shards={checkpoint / 'training' / 'shards'}")
    arguments = [str(a) for a in command(1, tmp_path / "out", (*common, *phase, "save_every=100"))[1:]]
    done = subprocess.run([sys.executable, "-c", _SPOIL, "phase", *arguments], capture_output=True, text=True)
    assert done.returncode == 0 and "left out" not in done.stderr, done.stderr
    assert min(losses(tmp_path / "out")[8:]) > 20


def test_the_batch_of_a_step_passes_over_those_left_out():
    assert [_number(step, (1, 2, 5)) for step in range(5)] == [0, 3, 4, 6, 7]


def test_schedules():
    linear = get_recipe("phi1-base", [])
    assert learning_rate(linear, 0) == pytest.approx(1e-3 / 750)
    assert learning_rate(linear, 750) == pytest.approx(1e-3)
    assert learning_rate(linear, 750 + (36_000 - 750) // 2) == pytest.approx(5e-4, rel=1e-3)
    assert learning_rate(get_recipe("phi15", []), 0) == learning_rate(get_recipe("phi15", []), 30_000) == 2e-4
    cosine = get_recipe("phi3-mini-4k", [])
    assert learning_rate(cosine, cosine.schedule.steps) == pytest.approx(cosine.schedule.final_lr)


def test_a_run_begins_with_another_checkpoint(tmp_path, checkpoint, common):
    training = checkpoint / "training"
    mine = (
        f"data.tokenizer={training / 'tokenizer'}",
        f"data.shards={training / 'shards'}",
        "schedule.steps=2",
        "optimizer.lr=1e-6",
    )
    raw = json.loads((checkpoint / "config.json").read_text())
    fields = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
              "vocab_size", "max_position_embeddings", "sliding_window")  # fmt: skip
    same = tuple(f"model.{f}={raw[f]}" for f in fields)
    before = json.loads((training / "summary.json").read_text())
    out = tmp_path / "out"
    changes = (
        *mine,
        *same,
        f"init_from={checkpoint}",
        "objective.dropout=0.1",
        "parallelism.gradient_checkpointing=true",
        "data.separate_documents=true",
        "data.sequence_length=160",
        "data.batch_size=4",
    )
    done = run(*command(1, out, changes))
    assert done.returncode == 0, done.stderr
    after = json.loads((out / "training" / "summary.json").read_text())
    assert abs(after["initial_loss"] - before["final_loss"]) < 0.3
    done = run(*command(1, tmp_path / "other", (*common, f"init_from={checkpoint}")))
    assert done.returncode == 2
    assert "the recipe's model has" in done.stderr


def test_documents_that_are_kept_apart_train_otherwise(tmp_path, common, alone):
    done = run(
        *command(1, tmp_path / "apart", (*common, "data.separate_documents=true", "parallelism.micro_batch_size=2"))
    )
    assert done.returncode == 0, done.stderr
    found = losses(tmp_path / "apart")
    assert found != alone and np.abs(np.subtract(found, alone)).max() < 0.5


def test_a_run_begun_before_a_setting_was_there(tmp_path, common):
    out = tmp_path / "out"
    recipe = get_recipe("phi3-demo", [*common, "initializer=published"])
    assert claim(recipe, out)
    record = out / "training" / "recipe.json"
    there = json.loads(record.read_text())
    del there["initializer"]
    record.write_text(json.dumps(there))
    assert not claim(recipe, out)
    with pytest.raises(UsageError, match="holds a run with initializer=published, not fan_in"):
        claim(vary(recipe, initializer="fan_in"), out)
    record.write_text(json.dumps(there | {"seed": "x"}))
    with pytest.raises(UsageError, match="holds a run with "):
        claim(recipe, out)
