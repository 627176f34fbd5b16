import hashlib
import json
import resource
import signal
import subprocess
import time
from collections import Counter

import numpy as np
import pytest
from support import SCRIPTS, run, run_here, settings

from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.backends.reference import ReferenceBackend
from phi_runtime.errors import UsageError
from phi_runtime.files import sha256
from phi_runtime.generation.sampler import log_softmax
from phi_train.data.shards import open_data

pytestmark = pytest.mark.integration


def test_the_model_learned(checkpoint):
    summary = json.loads((checkpoint / "training" / "summary.json").read_text())
    assert summary["initial_loss"] > 6
    assert summary["final_loss"] < summary["unigram_loss"] - 0.5
    log = [json.loads(line) for line in (checkpoint / "training" / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log] == list(range(1, 151))


def test_its_losses_are_what_a_count_and_the_reference_find(checkpoint):
    """The two figures that say what was learned, each computed another way."""
    summary = json.loads((checkpoint / "training" / "summary.json").read_text())
    data = open_data(checkpoint / "training" / "shards")
    rows = data.heldout_windows(160, 8)
    counts = Counter(np.concatenate(data.shards).tolist())
    total = sum(counts.values()) + data.vocab_size
    unigram = -np.mean([np.log((counts[t] + 1) / total) for t in rows[:, 1:].ravel().tolist()])
    assert summary["unigram_loss"] == pytest.approx(unigram, abs=1e-6)
    opened = open_checkpoint(checkpoint)
    losses = []
    for row in rows.tolist():
        log_p = log_softmax(ReferenceBackend(opened.config.decoder(), opened.read).forward(row[:-1], all_logits=True))
        losses.append(-log_p[np.arange(len(row) - 1), row[1:]].mean())
    assert summary["final_loss"] == pytest.approx(np.mean(losses), abs=0.02)  # bfloat16 against float32


def test_a_second_run_does_no_work_twice(checkpoint, corpus):
    before = (checkpoint / "model.safetensors").stat().st_mtime_ns
    done = run("phi-train", "phi3-demo", "--out", checkpoint, *settings(f"data.corpus={corpus}"))
    assert done.returncode == 0
    assert (checkpoint / "model.safetensors").stat().st_mtime_ns == before


def test_killed_and_continued_it_ends_in_the_same_bytes(tmp_path, checkpoint):
    training = checkpoint / "training"
    common = settings(
        f"data.tokenizer={training / 'tokenizer'}",
        f"data.shards={training / 'shards'}",
        "schedule.steps=40",
        "save_every=8",
    )
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run("phi-train", "phi3-demo", "--out", whole, *common).returncode == 0

    process = subprocess.Popen(
        [SCRIPTS / "phi-train", "phi3-demo", "--out", broken, *common],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not list((broken / "training" / "state").glob("step-*")) and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (broken / "config.json").exists(), "it ended before it could be killed"
    states = sorted((broken / "training" / "state").glob("step-*"))
    assert states

    done = run("phi-train", "phi3-demo", "--out", broken, *common)
    assert done.returncode == 0, done.stderr
    assert sha256(broken / "model.safetensors") == sha256(whole / "model.safetensors")
    strip = lambda p: [json.loads(x)["loss"] for x in (p / "training" / "log.jsonl").read_text().splitlines()]  # noqa: E731
    assert strip(broken) == strip(whole)


def test_a_damaged_state_is_passed_over(tmp_path, checkpoint):
    import torch

    from phi_runtime.architecture.config import read_config
    from phi_train.models import build
    from phi_train.recipes.catalogue import get_recipe
    from phi_train.trainer.engine import join, make_engine
    from phi_train.trainer.state import Counters, load_state, save_state

    ranks = join()
    engine = make_engine(build(read_config(checkpoint)), get_recipe("phi3-demo", []), ranks)
    for step in (3, 6):
        save_state(tmp_path, Counters(step, 1.0, (2,)), engine, ranks)
    for name in ("rank-00000-of-00001.safetensors", "random.safetensors"):
        newest = tmp_path / "step-00000006" / name
        content = bytearray(newest.read_bytes())
        content[-1] ^= 1
        newest.write_bytes(content)
        with torch.no_grad():
            next(engine.module.parameters()).zero_()
        assert load_state(tmp_path, engine, ranks) == Counters(3, 1.0, (2,))
        assert bool(next(engine.module.parameters()).any())
    said = json.loads((tmp_path / "step-00000003" / "state.json").read_text())
    del said["ranks"], said["self"]
    whole = json.dumps(said | {"self": hashlib.sha256(json.dumps(said).encode()).hexdigest()})
    (tmp_path / "step-00000003" / "state.json").write_text(whole)
    with pytest.raises(UsageError, match="step-00000003: an earlier version wrote it"):
        load_state(tmp_path, engine, ranks)


def test_a_recipe_says_how_weights_are_drawn(checkpoint):
    from phi_train.recipes.catalogue import get_recipe
    from phi_train.trainer.engine import join
    from phi_train.trainer.setup import make_model

    for initializer, std in (("published", 0.02), ("fan_in", 1.0)):
        recipe = get_recipe("phi3-demo", [f"initializer={initializer}"])
        model = make_model(recipe, recipe.model, checkpoint / "training" / "tokenizer", join())
        assert float(model.model.embed_tokens.weight.std()) == pytest.approx(std, rel=0.05)


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["phi3-dem"], "did you mean phi3-demo"),
        (["phi3-demo", "--set", "stepps=3"], "did you mean schedule.steps"),
        (["phi3-demo", "--set", "schedule.steps=many"], "schedule.steps: expected `int`"),
        (["phi3-demo", "--set", "steps"], "key=value"),
        (["phi3-demo", "--set", "schedule.steps=0"], "schedule.steps: expected `int` >= 1"),
        (["phi3-demo", "--set", "data.sequence_length=9999"], "sequence_length"),
        (["phi3-demo", "--set", "model.num_attention_heads=5"], "do not divide"),
        (["phi3-demo", "--set", "model.vocab_size=-4"], "vocab_size"),
        (["phi3-demo", "--set", "optimizer.beta1=7"], "beta1"),
        (["phi3-demo", "--set", "model.tie_word_embeddings=maybe"], "expected `bool`"),
        (["phi3-demo", "--set", "model.partial_rotary_factor=0.01"], "leaves 0 dimensions"),
        (["phi3-demo", "--set", "parallelism.micro_batch_size=3"], "does not divide"),
        (["phi3-demo", "--set", "schedule.type=cosin"], "none of constant, cosine, linear (did you mean cosine?)"),
        (["phi3-demo", "--set", "model.rope_scaling=su"], "model.rope_scaling=su"),
        (["phi3-demo", "--set", "data.corpus=/no/such/folder"], "no such folder"),
        (["phi3-demo", "--set", "data.shards=/no/such/folder", "--set", "data.tokenizer=/no"], "phi-train shards"),
    ],
)
def test_bad_settings_get_one_line(tmp_path, args, says):
    done = run_here("phi-train", *args, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert says in done.stderr
    assert "Traceback" not in done.stderr


def test_another_recipe_in_the_same_folder_is_refused(checkpoint, corpus):
    done = run("phi-train", "phi3-demo", "--out", checkpoint, *settings(f"data.corpus={corpus}", "seed=7"))
    assert done.returncode == 2
    assert "seed=0, not 7" in done.stderr


def test_a_foreign_folder_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    done = run("phi-train", "phi3-demo", "--out", tmp_path)
    assert done.returncode == 2
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]


def test_too_little_data_is_refused(tmp_path, checkpoint):
    training = checkpoint / "training"
    common = settings(
        f"data.tokenizer={training / 'tokenizer'}",
        f"data.shards={training / 'shards'}",
        "data.batch_size=100000",
        "parallelism.micro_batch_size=4",
    )
    done = run("phi-train", "phi3-demo", "--out", tmp_path / "out", *common)
    assert done.returncode == 2
    assert "a batch takes 100000" in done.stderr


def test_data_of_another_tokenizer_is_refused(tmp_path, checkpoint):
    training = checkpoint / "training"
    other = tmp_path / "tokenizer"
    other.mkdir()
    for path in (training / "tokenizer").iterdir():
        (other / path.name).write_bytes(path.read_bytes() + b"\n")
    common = settings(f"data.tokenizer={other}", f"data.shards={training / 'shards'}")
    done = run("phi-train", "phi3-demo", "--out", tmp_path / "out", *common)
    assert done.returncode == 2
    assert "not tokenised with" in done.stderr


def test_list_names_the_recipes():
    done = run("phi-train", "list")
    assert done.returncode == 0
    assert "phi3-demo" in done.stdout


@pytest.mark.parametrize("command", ["tokenizer", "shards", "phi3-demo"])
def test_a_full_disk(command, tmp_path, checkpoint, corpus):
    def restrict():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    training = checkpoint / "training"
    arguments = {
        "tokenizer": ["--corpus", corpus, "--vocab-size", "768"],
        "shards": ["--corpus", corpus, "--tokenizer", training / "tokenizer"],
        "phi3-demo": settings(
            f"data.tokenizer={training / 'tokenizer'}",
            f"data.shards={training / 'shards'}",
            "schedule.steps=2",
            "save_every=1",
        ),
    }[command]
    out = tmp_path / "out"
    done = run("phi-train", command, *arguments, "--out", out, preexec_fn=restrict)
    assert done.returncode == 2, done.stderr
    assert "disk is full" in done.stderr.strip().splitlines()[-1]
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("**/.*")), "nothing half-written"
    assert not (out / "config.json").exists()
