"""A longer context by LongRoPE."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from support import run

from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.architecture.config import LongRope
from phi_runtime.errors import UsageError
from phi_train.checkpoints.extend import extend, loss_under, search, yarn
from phi_train.models import load_model

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def data(checkpoint):
    return checkpoint / "training" / "shards"


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    factors = yarn(48, 10000.0, 4096, 32.0)
    turns = 4096 * 10000.0 ** (-np.arange(48) / 48) / (2 * np.pi)
    assert (factors[turns > 32] == 1).all() and np.allclose(factors[turns < 1], 32)
    assert (np.diff(factors) >= 0).all()


def test_the_search_finds_what_is_better_and_never_what_is_worse():
    wanted = np.linspace(1, 8, 12) ** 1.3 / 2 + 0.5
    asked = []

    def judge(factors):
        asked.append(factors)
        return float(np.square(factors - wanted).sum())

    begin = yarn(12, 10000.0, 128, 8.0)
    found = search([begin, np.full(12, 8.0)], 8.0, judge, iterations=30)
    assert judge(found) == min(map(judge, list(asked))) < 0.2 * judge(begin)
    assert all((np.diff(f) >= 0).all() and (f >= 1).all() for f in asked)
    assert np.array_equal(found, search([begin, np.full(12, 8.0)], 8.0, judge, iterations=30))


def test_what_is_written_is_what_was_judged(tmp_path, checkpoint, data):
    transformers = pytest.importorskip("transformers")
    small = tmp_path / "small"
    before, after = extend(checkpoint, 640, data, small, windows=2, iterations=2)
    assert after <= before
    opened = open_checkpoint(small)
    c = opened.config
    assert (c.max_position_embeddings, c.original_max_position_embeddings, c.sliding_window) == (640, 320, None)
    assert c.decoder().rope.attention_factor == pytest.approx(np.sqrt(1 + np.log(2) / np.log(320)))
    old = open_checkpoint(checkpoint)
    assert all(np.array_equal(opened.read(n), old.read(n)) for n in c.tensor_shapes())
    # Both sides of the switch, as the reference computes it.
    model = load_model(opened).eval()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).eval()
    tokens = torch.randint(3, 700, (1, 400), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for length in (320, 321, 400):
            apart = model(tokens[:, :length]) - theirs(tokens[:, :length]).logits
            assert apart.abs().max() < 1e-4
    texts = torch.randint(3, 700, (2, 640), generator=torch.Generator().manual_seed(1))
    # Judged with factors of its own, the model in memory having others.
    other = load_model(opened)
    other.decoder = dataclasses.replace(c, rope_scaling=LongRope((1.0,) * 48, (9.0,) * 48)).decoder()
    judged = loss_under(other, old.config, 640, np.array(c.rope_scaling.long_factor), texts)
    with torch.no_grad():
        logits = model(texts[:, :-1])
    assert judged == pytest.approx(
        float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), texts[:, 1:].flatten())), abs=0.01
    )


def test_it_is_trained_there_and_its_short_context_too(tmp_path, checkpoint, data):
    done = run("phi-train", "extend", checkpoint, "--context", 640, "--data", data, "--method", "yarn",
               "--windows", 2, "--out", tmp_path / "long")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "--set data.short_context_interval=2" in done.stdout
    changes = [
        f"model={tmp_path / 'long'}",
        f"init_from={tmp_path / 'long'}",
        f"data.shards={data}",
        "schedule.steps=4",
        f"data.tokenizer={checkpoint / 'training' / 'tokenizer'}",
        "data.sequence_length=640",
        "data.batch_size=2",
        "data.short_context_interval=2",
        "samples=0",
        "data.eval_windows=2",
        "optimizer.lr=1e-4",
    ]
    done = run("phi-train", "phi3-demo", "--out", tmp_path / "out", *(p for c in changes for p in ("--set", c)))
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out" / "config.json").read_text())["rope_scaling"]["long_factor"]
    assert len((tmp_path / "out" / "training" / "log.jsonl").read_text().splitlines()) == 4


def test_what_cannot_be_extended(tmp_path, checkpoint, data):
    with pytest.raises(UsageError, match="has 320 already"):
        extend(checkpoint, 320, data, tmp_path / "out")
    with pytest.raises(UsageError, match="no method 'ntk'"):
        extend(checkpoint, 640, data, tmp_path / "out", "ntk")
    with pytest.raises(UsageError, match="are wanted; give more"):
        extend(checkpoint, 100_000, data, tmp_path / "out", windows=500)
    extend(checkpoint, 640, data, tmp_path / "once", "pi", windows=1)
    with pytest.raises(UsageError, match="no phi3 with a plain rotary"):
        extend(tmp_path / "once", 1280, data, tmp_path / "out")
    assert not (tmp_path / "out").exists()
