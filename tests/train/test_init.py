"""`phi-train init`: random checkpoints of any published architecture."""

import json

import numpy as np
import pytest
import transformers
from support import run

from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.architecture.config import num_parameters
from phi_runtime.text.tokenizer import Tokenizer
from phi_train.checkpoints import init as module
from phi_train.checkpoints.init import init
from phi_train.recipes.published import PUBLISHED


def test_a_small_one_by_name(tmp_path):
    done = run("phi-train", "init", "tinystories-1m", "--out", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    assert "quality means nothing" in done.stdout
    checkpoint = open_checkpoint(tmp_path / "a")
    assert num_parameters(checkpoint.config) == num_parameters(PUBLISHED["tinystories-1m"]())
    embedding = checkpoint.read("transformer.wte.weight")
    assert embedding.std() == pytest.approx(0.02, rel=0.01)
    assert abs(embedding.mean()) < 1e-4
    assert not checkpoint.read("transformer.ln_f.bias").any()
    assert (checkpoint.read("transformer.ln_f.weight") == 1).all()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a")
    assert model.config.num_layers == 8

    assert run("phi-train", "init", "tinystories-1m", "--out", tmp_path / "b").returncode == 0
    assert run("phi-train", "init", "tinystories-1m", "--out", tmp_path / "c", "--seed", 1).returncode == 0
    bytes_of = [(tmp_path / n / "model.safetensors").read_bytes() for n in "abc"]
    assert bytes_of[0] == bytes_of[1] != bytes_of[2]


def test_the_tokenizer_has_the_models_size_and_reads_all_text(tmp_path):
    init("tinystories-1m", tmp_path / "a")
    tokenizer = Tokenizer(tmp_path / "a")
    assert tokenizer.vocab_size <= 50257
    for text in ("Once upon a time, a fox", "def f(x):\n\treturn x  # 日本 \U0001f600"):
        ids = tokenizer.encode(text)
        assert max(ids) < 50257
        assert tokenizer.decode(ids) == text
    assert tokenizer.id("<|endoftext|>") == 50257 - 64


def test_any_published_configuration_and_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SHARD", 3_000_000)
    raw = PUBLISHED["phi3-mini-4k"]().to_json() | {
        "vocab_size": 2000, "hidden_size": 192, "intermediate_size": 256, "num_attention_heads": 2,
        "num_key_value_heads": 2, "num_hidden_layers": 6, "eos_token_id": 5, "pad_token_id": 5,
        "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(raw))
    init(str(tmp_path / "config.json"), tmp_path / "a")
    assert len(list((tmp_path / "a").glob("*.safetensors"))) > 1
    checkpoint = open_checkpoint(tmp_path / "a")
    assert "auto_map" not in json.loads((tmp_path / "a" / "config.json").read_text())
    matrix = checkpoint.read("model.layers.5.mlp.down_proj.weight")
    assert np.isfinite(matrix).all()
    assert matrix.std() == pytest.approx(0.02, rel=0.05)
    done = run(
        "phi-export", "--int4", "--fast", tmp_path / "a", "--out", tmp_path / "out", "--format", "gguf", "--tokens", 32
    )
    assert done.returncode == 0, done.stderr
    assert "weights are random" in done.stdout


def test_what_cannot_be_made(tmp_path):
    for args, says in ((["phi4"], "phi3-mini-4k"), ([str(tmp_path / "none.json")], "neither")):
        done = run("phi-train", "init", *args, "--out", tmp_path / "x")
        assert done.returncode == 2
        assert says in done.stderr
    (tmp_path / "full").mkdir()
    done = run("phi-train", "init", "tinystories-1m", "--out", tmp_path / "full")
    assert done.returncode == 2
    assert "exists already" in done.stderr
