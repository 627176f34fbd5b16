"""Phi saved as LlamaForCausalLM or MistralForCausalLM, the way Unsloth and others do: read as the phi3 that it is."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import run

from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.architecture.config import Phi3Config
from phi_runtime.backends.reference import Reference
from phi_runtime.errors import CheckpointError, UnsupportedError

pytestmark = pytest.mark.integration

KINDS = {"llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM"}


def split(folder, out, kind, tied=False, **fields):
    """A phi3 folder as the other architecture saves it."""
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("training", "calibration"))
    raw = json.loads((out / "config.json").read_text())
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "rope_theta", "bos_token_id",
            "eos_token_id", "pad_token_id", "initializer_range", "torch_dtype")  # fmt: skip
    config = {name: raw[name] for name in kept} | {"model_type": kind, "architectures": [KINDS[kind]]}
    config |= {"tie_word_embeddings": tied}
    if kind == "mistral":
        config["sliding_window"] = raw["sliding_window"]
    (out / "config.json").write_text(json.dumps(config | fields))
    heads, kv = raw["num_attention_heads"], raw["num_key_value_heads"]
    width = raw["hidden_size"] // heads
    weights = {}
    for name, w in load_file(out / "model.safetensors").items():
        if "qkv_proj" in name:
            for part, rows in zip("qkv", w.split([heads * width, kv * width, kv * width]), strict=True):
                weights[name.replace("qkv_proj", f"{part}_proj")] = rows.clone()
        elif "gate_up_proj" in name:
            for part, rows in zip(("gate", "up"), w.chunk(2), strict=True):
                weights[name.replace("gate_up_proj", f"{part}_proj")] = rows.clone()
        elif not (tied and name == "lm_head.weight"):
            weights[name] = w
    save_file(weights, out / "model.safetensors", {"format": "pt"})
    return out


def logits(folder, tokens):
    checkpoint = open_checkpoint(folder)
    return Reference(checkpoint.config.decoder(), checkpoint.read, 0).forward(tokens, True)[0]


LONGROPE = {"rope_type": "longrope", "short_factor": [1.1] * 48, "long_factor": [3.0] * 48}


@pytest.mark.parametrize(
    ("kind", "fields"),
    [
        ("llama", {}),
        ("llama", {"tied": True}),
        ("llama", {"head_dim": 96, "rms_norm_eps": None}),
        ("mistral", {}),
        ("mistral", {"sliding_window": None}),
        ("mistral", {"sliding_window": 40}),
        ("llama", {"max_position_embeddings": 512, "original_max_position_embeddings": 64, "rope_scaling": LONGROPE}),
    ],
)
def test_it_is_what_transformers_computes(kind, fields, checkpoint, tokens, tmp_path):
    folder = split(checkpoint, tmp_path / "split", kind, **fields)
    if fields.get("rms_norm_eps", 0) is None:
        raw = json.loads((folder / "config.json").read_text())
        del raw["rms_norm_eps"]  # the architecture's own default
        (folder / "config.json").write_text(json.dumps(raw))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    assert type(theirs).__name__ == KINDS[kind]
    assert isinstance(open_checkpoint(folder).config, Phi3Config)
    for count in (30, 120):  # LongRoPE's short factors and its long ones, inside a window and beyond it
        with torch.no_grad():
            expected = theirs(torch.tensor([tokens[:count]])).logits[0].numpy()
        np.testing.assert_allclose(logits(folder, tokens[:count]), expected, atol=2e-4 * expected.std())


def test_every_format_carries_it_and_the_trainer_reads_it(checkpoint, tmp_path):
    folder = split(checkpoint, tmp_path / "split", "mistral")
    for source, out in ((checkpoint, "phi3"), (folder, "mistral")):
        done = run("phi-export", "--int4", "--fast", source, "--out", tmp_path / out)
        assert done.returncode == 0, done.stderr
    assert "is saved as mistral" in " ".join(done.stderr.split()) + " ".join(done.stdout.split())
    for artifact in (
        "gguf/model.gguf",
        "onnx/model.onnx.data",
        "coreml/model.mlpackage/Data/com.apple.CoreML/weights/weight.bin",
    ):
        a, b = ((tmp_path / out / artifact).read_bytes() for out in ("phi3", "mistral"))
        assert a[-100_000:] == b[-100_000:]  # names may differ, weights do not
    from phi_train.models import load_model

    a, b = (load_model(open_checkpoint(f)).state_dict() for f in (checkpoint, folder))
    assert all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("kind", "fields", "error", "says"),
    [
        ("llama", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, UnsupportedError, "llama3"),
        ("llama", {"attention_bias": True}, UnsupportedError, "attention_bias"),
        ("llama", {"mlp_bias": True}, UnsupportedError, "mlp_bias"),
        ("llama", {"hidden_act": "gelu"}, UnsupportedError, "hidden_act"),
        ("llama", {"head_dim": 64}, UnsupportedError, "head_dim"),
        ("llama", {"partial_rotary_factor": 0.5}, UnsupportedError, "partial_rotary_factor"),
        ("llama", {"model_type": "mixtral"}, UnsupportedError, "mixtral"),
        ("llama", {"intermediate_size": 100}, CheckpointError, "shape"),
    ],
)
def test_what_no_phi_has_is_named_before_any_work(kind, fields, error, says, checkpoint, tmp_path):
    folder = split(checkpoint, tmp_path / "split", kind, **fields)
    with pytest.raises(error, match=says):
        open_checkpoint(folder)
