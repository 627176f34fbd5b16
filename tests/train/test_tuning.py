"""What comes after pre-training, by the commands a user types; and what can be seen of a run."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
from support import SCRIPTS, run, settings

from phi_train.models.greedy import continuations

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def questions(tmp_path_factory, corpus):
    out = tmp_path_factory.mktemp("questions") / "questions.jsonl"
    done = run("phi-train", "make-sft-data", "--corpus", corpus, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def talks(tmp_path_factory, questions, checkpoint):
    out = tmp_path_factory.mktemp("talks") / "talks"
    done = run("phi-train", "shards", "--conversations", questions, "--tokenizer", checkpoint, "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def tuned(tmp_path_factory, checkpoint, talks):
    out = tmp_path_factory.mktemp("tuned") / "tuned"
    done = tune(out, checkpoint, talks, "objective.type=sft", "schedule.steps=60")
    assert done.returncode == 0, done.stderr
    return out


def tune(out, begin, data, *changes):
    """phi-train from a checkpoint, on some data."""
    common = [
        f"model={begin}",
        f"init_from={begin}",
        f"data.tokenizer={begin}",
        f"data.shards={data}",
        "data.sequence_length=160",
    ]
    common += ["data.batch_size=8", "schedule.warmup_steps=5", "optimizer.lr=2e-3", "save_every=30", *changes]
    return run("phi-train", "phi3-demo", "--out", out, *(part for c in common for part in ("--set", c)))


def summary(out):
    return json.loads((out / "training" / "summary.json").read_text())


def test_questions_are_about_functions(questions):
    lines = [json.loads(line)["messages"] for line in questions.read_text().splitlines()]
    assert len(lines) > 300
    plain = 0
    for question, answer in lines:
        signature, asked = question["content"].splitlines()
        found = re.fullmatch(r"def (\w+)\(([\w, ]*)\):", signature)
        if found:  # no defaults, annotations or stars
            plain += 1
            names = found[2].split(", ")
            expected = {
                "What is it called?": f"It is called {found[1]}.",
                "What does it take?": f"It takes {', '.join(names)}.",
                "How many arguments does it take?": f"It takes {len(names)} of them.",
            }[asked]
            assert answer["content"] == expected
    assert plain > 100


def test_it_learns_to_answer(tuned):
    said = summary(tuned)
    assert said["final_loss"] < said["initial_loss"] - 1.5
    assert said["unigram_loss"] is None


def test_it_learns_not_to_say_what_it_said(tmp_path, tuned, questions):
    pairs = tmp_path / "pairs.jsonl"
    done = run("phi-train", "make-preferences", tuned, "--conversations", questions, "--most", 300, "--out", pairs)
    assert done.returncode == 0, done.stderr
    assert all(line["chosen"] != line["rejected"] for line in map(json.loads, pairs.read_text().splitlines()))
    done = run("phi-train", "shards", "--conversations", pairs, "--tokenizer", tuned, "--out", tmp_path / "pairs")
    assert done.returncode == 0, done.stderr
    done = tune(
        tmp_path / "out", tuned, tmp_path / "pairs", "objective.type=dpo", "schedule.steps=20", "optimizer.lr=3e-4"
    )
    assert done.returncode == 0, done.stderr
    assert summary(tmp_path / "out")["initial_loss"] == pytest.approx(0.6931, abs=2e-3)
    assert summary(tmp_path / "out")["final_loss"] < 0.6
    assert "nats per pair" in done.stdout


def test_a_pupil_comes_nearer_to_its_teacher(tmp_path, checkpoint, text):
    training = checkpoint / "training"
    common = settings(
        f"data.tokenizer={training / 'tokenizer'}",
        f"data.shards={training / 'shards'}",
        "schedule.steps=40",
        f"objective.teacher={checkpoint}",
        "model.num_hidden_layers=1",
        "samples=0",
        "objective.qat=int4-g64",
    )
    done = run("phi-train", "phi3-demo", "--out", tmp_path / "out", *common)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(s)["loss"] for s in (tmp_path / "out" / "training" / "log.jsonl").read_text().splitlines()]
    assert lines[-1] < lines[0] - 1  # of divergence
    assert summary(tmp_path / "out")["final_loss"] < summary(tmp_path / "out")["initial_loss"] - 1
    done = run("phi-train", "phi3-demo", "--out", tmp_path / "other", *common, "--set", "model.vocab_size=800")
    assert done.returncode == 2 and "has 768 token ids, its pupil 800" in done.stderr


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["objective.type=sft"], "holds a corpus, phi3-demo learns from conversations"),
        (["objective.type=dpo"], "holds a corpus, phi3-demo learns from preferences"),
        (["objective.type=dpo", "init_from=none"], "give init_from"),
        (["objective.type=rlhf"], "is none of dpo, pretrain, sft"),
        (["parallelism.compile=yes"], "'yes' is none of auto, true, false"),
        (["data.phase2_step=3"], "both data.phase2_shards and data.phase2_step"),
        (["parallelism.offload_optimizer=true"], "set parallelism.zero_stage"),
        (["data.short_context_interval=2"], "a context before LongRoPE"),
        (["data.shards=TALKS"], "holds conversations, phi3-demo learns from a corpus"),
        (["model=/nowhere"], "/nowhere"),
    ],
)
def test_what_does_not_go_together(changes, said, tmp_path, checkpoint, talks):
    changes = [c.replace("TALKS", str(talks)) for c in changes]
    done = tune(tmp_path / "out", checkpoint, checkpoint / "training" / "shards", *changes)
    assert done.returncode == 2 and said in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path, checkpoint):
    for wrong in ("data.shards=/nowhere", "init_from=/nowhere", "objective.teacher=/nowhere"):
        done = tune(tmp_path / "out", checkpoint, checkpoint / "training" / "shards", wrong)
        assert done.returncode == 2 and "/nowhere" in done.stderr
        assert not list(tmp_path.iterdir())


def test_a_mistake_on_two_processes_is_told_once(tmp_path, checkpoint):
    common = settings(f"data.tokenizer={checkpoint}", "data.shards=/nowhere")
    launcher = ["--standalone", "--nproc-per-node", "2", SCRIPTS / "phi-train"]
    done = run("torchrun", *launcher, "phi3-demo", "--out", tmp_path / "out", *common)
    assert done.returncode == 1  # torchrun's own
    assert done.stderr.count("error: /nowhere") == 1 and "Connection closed" not in done.stderr


def test_teachers_that_do_not_fit(tmp_path, checkpoint):
    shards = checkpoint / "training" / "shards"
    short = tmp_path / "short"
    shutil.copytree(checkpoint, short, ignore=shutil.ignore_patterns("training"))
    raw = json.loads((short / "config.json").read_text())
    raw |= {"max_position_embeddings": 64, "original_max_position_embeddings": 64}
    (short / "config.json").write_text(json.dumps(raw))
    done = tune(tmp_path / "out", checkpoint, shards, f"objective.teacher={short}")
    assert done.returncode == 2 and "has 64 positions" in done.stderr
    other = tmp_path / "other"
    shutil.copytree(checkpoint, other, ignore=shutil.ignore_patterns("training"))
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    for field in ("teacher", "init_from"):
        done = tune(tmp_path / "out", checkpoint, shards, f"{field}={other}")
        assert done.returncode == 2 and "has another tokenizer" in done.stderr


def test_what_a_model_is_asked(tmp_path, tuned):
    """Lines as shards reads them; and what could not be asked is no mistake."""
    talks = tmp_path / "talks.jsonl"
    ask = {"role": "user", "content": "def f(x):\u2028What is it called?"}
    long = {"role": "user", "content": "x = 1\n" * 200}
    lines = [{"messages": [q, {"role": "assistant", "content": "No."}]} for q in (ask, long)]
    talks.write_text("\n" + "\n\n".join(json.dumps(line, ensure_ascii=False) for line in lines))
    done = run("phi-train", "make-preferences", tuned, "--conversations", talks, "--out", tmp_path / "pairs.jsonl")
    assert done.returncode == 0, done.stderr
    (pair,) = map(json.loads, (tmp_path / "pairs.jsonl").read_text().split("\n")[:-1])
    assert pair["prompt"] == [ask] and pair["rejected"] not in ("", "No.")
    for content in (b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "x"}]}',
                    b"\xff\xfe", b'{"messages": [{"content": "x"}]}'):  # fmt: skip
        talks.write_bytes(b"\n" + content)
        for command in (("make-preferences", tuned), ("shards", "--tokenizer", tuned)):
            done = run("phi-train", *command, "--conversations", talks, "--out", tmp_path / "out")
            assert done.returncode == 2 and "line 2: " in done.stderr and "Traceback" not in done.stderr
            assert done.stderr.count("error: ") == 1


def test_answers_end_where_they_should():
    # Says the number of what it reads, and 3 after 2.
    def model(tokens):
        logits = __import__("torch").zeros(*tokens.shape, 9)
        return logits.scatter_(-1, (tokens[..., None] + 1) % 9, 1)

    said = continuations(model, [[0], [5, 1], [7]], 4, 100, {3})
    assert said == [[1, 2], [2], [8, 0, 1, 2]]
    assert continuations(model, [[0] * 5, [4] * 6], 4, 6) == [[1], []]


def test_a_run_can_be_watched(tuned):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    training = tuned / "training"
    logged = [json.loads(line) for line in (training / "log.jsonl").read_text().splitlines()]
    events = EventAccumulator(str(training / "tensorboard")).Reload()
    assert [e.step for e in events.Scalars("loss")] == list(range(1, 61))
    assert [e.value for e in events.Scalars("loss")] == pytest.approx([line["loss"] for line in logged], abs=1e-5)
    assert all(0 < line["utilisation"] < 2 and line["tokens_per_second"] > 0 for line in logged)
    samples = [json.loads(line) for line in (training / "samples.jsonl").read_text().splitlines()]
    assert [s["step"] for s in samples] == [30, 30, 60, 60] and all(s["prompt"] for s in samples)
    assert any(s["text"] for s in samples)  # a model may end a text at once, but not every time
    assert (training / "loss.png").read_bytes().startswith(b"\x89PNG")


_OVERFLOWING = """
import sys
import phi_train.trainer.loss_scale as scaling
import phi_train.trainer.loop as loop
from phi_train.cli import main
from phi_train.trainer.fragments import full_weights
scaling.BEGIN = 2.0**36
real = loop._Run._scaled_step
def watched(self, scale):
    before = full_weights(self.engine, self.ranks)
    before = {name: weight.clone() for name, weight in before.items()}
    was = scale.scale
    real(self, scale)
    same = all((before[name] == weight).all() for name, weight in full_weights(self.engine, self.ranks).items())
    assert same == (scale.scale < was), (was, scale.scale)
    print("overflow" if same else "step", file=sys.stderr)
loop._Run._scaled_step = watched
sys.argv = ["phi-train", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize("stage", [0, 2, 3])
def test_float16_takes_no_step_where_it_overflows(stage, tmp_path, checkpoint):
    training = checkpoint / "training"
    common = settings(
        f"data.tokenizer={training / 'tokenizer'}",
        f"data.shards={training / 'shards'}",
        "parallelism.precision=fp16",
        "schedule.steps=40",
        f"parallelism.zero_stage={stage}",
        "data.sequence_length=24",
        "samples=0",
        "save_every=1000",
        "model.num_hidden_layers=1",
    )
    done = subprocess.run(
        [sys.executable, "-c", _OVERFLOWING, "phi3-demo", "--out", tmp_path / "out", *common],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert 5 < done.stderr.count("overflow\n") < 36 and done.stderr.count("step\n") > 4
    said = summary(tmp_path / "out")
    assert said["final_loss"] < said["initial_loss"] - 0.3


def test_a_worker_that_dies_is_started_again(tmp_path, checkpoint):
    training = checkpoint / "training"
    common = settings(
        f"data.tokenizer={training / 'tokenizer'}",
        f"data.shards={training / 'shards'}",
        "data.sequence_length=48",
        "schedule.steps=60",
        "save_every=5",
        "parallelism.precision=fp32",
        "parallelism.zero_stage=1",
        "samples=0",
    )
    out = tmp_path / "out"
    launcher = [SCRIPTS / "torchrun", "--standalone", "--nproc-per-node", "2", "--max-restarts", "2"]
    process = subprocess.Popen(
        [*launcher, SCRIPTS / "phi-train", "phi3-demo", "--out", out, *common],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # With the launcher's own store shared, processes find each other's addresses of before the restart.
        env={**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},
    )  # fmt: skip
    while not (out / "training" / "state" / "step-00000010").exists() and process.poll() is None:
        time.sleep(0.02)
    workers = [c for c in psutil.Process(process.pid).children() if "phi-train" in " ".join(c.cmdline())]
    os.kill(workers[-1].pid, signal.SIGKILL)
    said = process.communicate(timeout=200)
    assert process.returncode == 0, said[1][-3000:]
    steps = [json.loads(line)["step"] for line in (out / "training" / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 61))
