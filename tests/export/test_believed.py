"""Checkpoints that say a thing twice: what transformers believes is believed, or the folder is refused."""

import json
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import run

from phi_runtime.architecture.checkpoint import open_checkpoint, stop_tokens
from phi_runtime.backends.reference import Reference
from phi_runtime.errors import CheckpointError, UnsupportedError
from phi_runtime.text.tokenizer import Tokenizer


@pytest.fixture
def copy(checkpoint, tmp_path):
    return shutil.copytree(checkpoint, tmp_path / "copy", ignore=shutil.ignore_patterns("training", "calibration"))


def edit(folder, **fields):
    raw = json.loads((folder / "config.json").read_text()) | fields
    (folder / "config.json").write_text(json.dumps(raw))


def agree(folder, tokens):
    """Our logits and transformers', of the same folder."""
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor([tokens])).logits[0].numpy()
    checkpoint = open_checkpoint(folder)
    found = Reference(checkpoint.config.decoder(), checkpoint.read, 0).forward(tokens, True)[0]
    return np.abs(found - expected).max() < 1e-2 * expected.std()


def test_a_tied_config_with_a_head_of_its_own(copy, tokens):
    weights = load_file(copy / "model.safetensors")
    edit(copy, tie_word_embeddings=True)
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    checkpoint = open_checkpoint(copy)
    assert not checkpoint.config.decoder().tied and "head of its own" in checkpoint.notes[0]
    assert agree(copy, tokens[:40])
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()  # written out twice: tied all the same
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert open_checkpoint(copy).config.decoder().tied and agree(copy, tokens[:40])


def test_a_whole_file_beside_the_index_of_its_base(copy, tokens):
    weights = load_file(copy / "model.safetensors")
    base = {name: w + torch.randn_like(w.float()).to(w.dtype) * 0.05 for name, w in weights.items()}
    save_file(base, copy / "model-00001-of-00001.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": dict.fromkeys(base, "model-00001-of-00001.safetensors")}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    assert [f.name for f in open_checkpoint(copy).files] == ["model.safetensors"]
    assert agree(copy, tokens[:40])


def test_every_eos_stops_and_the_end_of_a_turn_always(copy):
    end = Tokenizer(copy).id("<|end|>")
    (copy / "generation_config.json").unlink()
    for eos in (2, [2], [2, 5], None):
        edit(copy, eos_token_id=eos)
        expected = {end} | ({eos} if isinstance(eos, int) else set(eos or ()))
        assert set(stop_tokens(open_checkpoint(copy))) == expected, eos


def test_rope_said_twice_and_otherwise_is_refused(copy):
    edit(copy, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, rope_scaling={"rope_theta": 500.0})
    with pytest.raises(CheckpointError, match="disagree"):
        open_checkpoint(copy)


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "base_model.model."])
def test_a_wrappers_prefix_is_left_out_and_said(prefix, copy, tokens):
    weights = load_file(copy / "model.safetensors")
    plain = open_checkpoint(copy).read("model.norm.weight")
    save_file({prefix + name: w for name, w in weights.items()}, copy / "model.safetensors", {"format": "pt"})
    checkpoint = open_checkpoint(copy)
    assert prefix in checkpoint.notes[0]
    np.testing.assert_array_equal(checkpoint.read("model.norm.weight"), plain)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised already (gptq)"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantised already (awq)"),
        ({"quantization_config": {"load_in_4bit": True}}, "quantised already (bitsandbytes)"),
    ],
)
def test_sound_weights_in_another_form_are_called_by_name(change, says, copy, tmp_path):
    edit(copy, **change)
    done = run("phi-export", "--int4", "--fast", copy, "--out", tmp_path / "out")
    assert done.returncode == 2 and says in done.stderr and "fetch" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_called_one(copy, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "my-phi", "r": 8}))
    with pytest.raises(UnsupportedError, match=r"PEFT adapter .* of my-phi"):
        open_checkpoint(adapter)
    weights = load_file(copy / "model.safetensors")
    name = "model.layers.0.self_attn.qkv_proj.weight"
    weights[name.replace(".weight", ".base_layer.weight")] = weights.pop(name)
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    with pytest.raises(UnsupportedError, match="quantised or an adapter's"):
        open_checkpoint(copy)
