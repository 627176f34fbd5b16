"""LoRA adapters that PEFT saved: merged while reading, they make the model that PEFT computes."""

import json
import shutil

import numpy as np
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import any_scales, run

from phi_export.adapter import adapted
from phi_export.calibrate.equalise import equalised
from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.backends.reference import Reference
from phi_runtime.errors import CheckpointError, NotFoundError, UnsupportedError
from phi_runtime.package.manifest import read_manifest

pytestmark = pytest.mark.integration

ALL = ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.fixture
def base(checkpoint, tmp_path):
    """A base of its own, since the folder keeps calibrations."""
    return shutil.copytree(checkpoint, tmp_path / "base", ignore=shutil.ignore_patterns("training", "calibration"))


@pytest.fixture
def tied(base):
    """The same, tied."""
    edit(base / "config.json", tie_word_embeddings=True)
    weights = load_file(base / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, base / "model.safetensors", {"format": "pt"})
    return base


def edit(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def load(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train(base, folder, model=None, grown=0, **settings):
    """An adapter with random weights, as if trained; its folder."""
    model = model or load(base)
    if grown:
        model.resize_token_embeddings(model.config.vocab_size + grown)
    config = peft.LoraConfig(r=4, task_type="CAUSAL_LM", **({"lora_alpha": 6} | settings))
    wrapped = peft.get_peft_model(model, config)
    torch.manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.5 * max(float(parameter.std()), 0.1)
    wrapped.save_pretrained(folder)
    if grown:
        shutil.copy(base / "tokenizer.json", folder)
    return folder


def agree(base, adapter, tokens, model=None, grown=0):
    """Our logits of base and adapter are PEFT's, and not those of the base alone."""
    model = model or load(base)
    if grown:
        model.resize_token_embeddings(model.config.vocab_size + grown)
    with torch.no_grad():
        plain = model(torch.tensor([tokens])).logits[0].numpy()
        wrapped = peft.PeftModel.from_pretrained(model, adapter)
        expected = wrapped(torch.tensor([tokens])).logits[0].numpy()
    merged = adapted(open_checkpoint(base), adapter)
    found = Reference(merged.config.decoder(), merged.read, 0).forward(tokens, True)[0]
    assert found.shape == expected.shape
    assert np.abs(found - expected).max() < 1e-3 * expected.std()
    assert np.abs(plain - expected).max() > 0.02 * expected.std()
    return merged


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ALL},
        {"target_modules": ALL, "use_rslora": True},
        {"target_modules": ALL, "use_dora": True},
        {"target_modules": "all-linear", "alpha_pattern": {r"layers\.1\..*": 3}, "rank_pattern": {"down_proj": 7}},
        {"target_modules": ["o_proj"], "modules_to_save": ["lm_head", "embed_tokens"]},
        {"target_modules": ["o_proj", "embed_tokens", "lm_head"]},
        {"target_modules": ["o_proj"], "trainable_token_indices": [3, 300, 301]},
        {"target_modules": ["qkv_proj"], "layers_to_transform": [1], "init_lora_weights": "gaussian"},
    ],
    ids=["lora", "rslora", "dora", "patterns", "modules_to_save", "embedding", "tokens", "one-layer"],
)
def test_what_peft_computes(settings, base, tmp_path, tokens):
    agree(base, train(base, tmp_path / "adapter", **settings), tokens[:40])


@pytest.mark.parametrize(
    ("settings", "stays_tied"),
    [
        ({"target_modules": ALL}, True),
        ({"target_modules": ["o_proj", "embed_tokens"]}, False),
        ({"target_modules": ["o_proj", "lm_head"]}, False),
        ({"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]}, False),
        ({"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["o_proj"], "trainable_token_indices": [3, 300, 301]}, True),
    ],
    ids=["lora", "embedding", "head", "saved-embedding", "saved-head", "saved-both", "tokens"],
)
def test_a_tied_base(settings, stays_tied, tied, tmp_path, tokens):
    merged = agree(tied, train(tied, tmp_path / "adapter", **settings), tokens[:40])
    assert merged.config.decoder().tied is stays_tied


@pytest.mark.parametrize("kind", ["base", "tied"])
@pytest.mark.parametrize("saved", [None, ["embed_tokens"], ["embed_tokens", "lm_head"]])
def test_an_embedding_that_grew(saved, kind, request, tmp_path, tokens):
    base = request.getfixturevalue(kind)
    adapter = train(base, tmp_path / "adapter", grown=8, target_modules=ALL, modules_to_save=saved)
    merged = agree(base, adapter, tokens[:40], grown=8)
    assert merged.config.vocab_size == 776
    (adapter / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="tokenizer"):
        adapted(open_checkpoint(base), adapter)


@pytest.mark.parametrize("kind", ["base", "tied"])
@pytest.mark.parametrize("targets", [ALL, ["o_proj", "embed_tokens"]], ids=["tokens", "embedding"])
def test_new_rows_that_were_trained(targets, kind, request, tmp_path, tokens):
    """Tokens were added and only these trained, or a LoRA was laid over the grown embedding."""
    base = request.getfixturevalue(kind)
    trained = {"trainable_token_indices": [3, 770]} if targets is ALL else {}
    adapter = train(base, tmp_path / "adapter", grown=8, target_modules=targets, **trained)
    if targets is not ALL and kind == "base":  # PEFT leaves the head's new rows out, whatever they were
        with pytest.raises(CheckpointError, match="save both"):
            adapted(open_checkpoint(base), adapter)
        return
    agree(base, adapter, [*tokens[:40], 770], grown=8)


def test_a_head_that_did_not_grow_along(base, tmp_path):
    adapter = train(base, tmp_path / "adapter", grown=8, target_modules=ALL)
    path = adapter / "adapter_model.safetensors"
    save_file({name: w for name, w in load_file(path).items() if "lm_head" not in name}, path)
    with pytest.raises(CheckpointError, match="save both"):
        adapted(open_checkpoint(base), adapter)


def test_separate_targets_on_a_fused_base(base, tmp_path, tokens):
    """Trained on the same weights in Mistral's layout, as Unsloth has them."""
    fused = load(base)
    c = fused.config
    shape = {name: getattr(c, name) for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
             "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings")}  # fmt: skip
    weights, split = fused.state_dict(), {}
    kv = c.num_key_value_heads * c.hidden_size // c.num_attention_heads
    for name, w in weights.items():
        if "qkv_proj" in name:
            for part, rows in zip("qkv", torch.split(w, [c.hidden_size, kv, kv]), strict=True):
                split[name.replace("qkv_proj", f"{part}_proj")] = rows
        elif "gate_up_proj" in name:
            for part, rows in zip(("gate", "up"), w.chunk(2), strict=True):
                split[name.replace("gate_up_proj", f"{part}_proj")] = rows
        else:
            split[name] = w

    def apart():
        made = transformers.MistralForCausalLM(transformers.MistralConfig(**shape, sliding_window=c.sliding_window))
        made.load_state_dict(split)
        return made

    theirs = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    for dora in (False, True):
        adapter = train(base, tmp_path / f"adapter-{dora}", apart(), target_modules=theirs, use_dora=dora)
        agree(base, adapter, tokens[:40], apart())


def test_rows_are_the_same_however_they_are_read(base, tmp_path):
    merged = adapted(open_checkpoint(base), train(base, tmp_path / "a", target_modules=ALL, use_dora=True))
    for name in ("model.layers.0.self_attn.qkv_proj.weight", "model.layers.1.mlp.down_proj.weight"):
        whole = merged.read(name)
        pieces = [merged.read(name, i, i + 17) for i in range(0, len(whole), 17)]
        np.testing.assert_allclose(np.concatenate(pieces), whole, rtol=2e-5, atol=1e-6)


def test_scales_are_moved_in_the_merged_model(base, tokens, tmp_path):
    merged = adapted(open_checkpoint(base), train(base, tmp_path / "adapter", target_modules=ALL))
    d = merged.config.decoder()
    plain, moved = (
        Reference(d, c.read, 0).forward(tokens[:40], True)[0] for c in (merged, equalised(merged, any_scales(d)))
    )
    np.testing.assert_allclose(moved, plain, atol=1e-3 * plain.std())


def test_what_is_saved_whole_comes_before_what_is_put_on_top(base, tmp_path):
    """However the file spells it: older versions of PEFT have `weight` for `base_layer.weight`."""
    adapter = train(base, tmp_path / "adapter", grown=8, target_modules=["embed_tokens", "lm_head"])
    merged = adapted(open_checkpoint(base), adapter)
    tensors = load_file(adapter / "adapter_model.safetensors")
    renamed = {name.replace(".base_layer.", "."): tensor for name, tensor in tensors.items()}
    assert renamed.keys() != tensors.keys()
    other = shutil.copytree(adapter, tmp_path / "older")
    save_file(renamed, other / "adapter_model.safetensors")
    older = adapted(open_checkpoint(base), other)
    for name in merged.tensors:
        assert np.array_equal(merged.read(name), older.read(name))


def test_the_bundle_is_the_merged_models(base, tmp_path):
    adapter = train(base, tmp_path / "adapter", target_modules=ALL)
    out = tmp_path / "out"
    done = run("phi-export", "--int4", "--windows", 4, base, "--adapter", adapter, "--out", out, "--accept-loss")
    assert done.returncode == 0, done.stderr
    assert (adapter / "calibration").is_dir() and not (base / "calibration").exists()
    for name in ("gguf", "onnx", "coreml"):
        assert "adapter_model.safetensors" in read_manifest(out / name).source.sha256
        checked = run("phi-export", "verify", out / name, "--against", base, "--adapter", adapter, "--accept-loss")
        assert checked.returncode == 0, checked.stdout + checked.stderr
    alone = run("phi-export", "verify", out / "gguf", "--against", base)
    assert alone.returncode == 2 and "--adapter" in alone.stderr and "Traceback" not in alone.stderr
    whole = run("phi-export", "--int4", adapter, "--out", tmp_path / "no")
    assert whole.returncode == 2 and "--adapter" in whole.stderr


@pytest.mark.parametrize(
    ("fields", "error", "why"),
    [
        ({"peft_type": "IA3"}, UnsupportedError, "IA3"),
        ({"init_lora_weights": "pissa"}, UnsupportedError, "pissa"),
        ({"use_qalora": True}, UnsupportedError, "use_qalora"),
        ({"alora_invocation_tokens": [1, 2]}, UnsupportedError, "alora_invocation_tokens"),
        ({"layer_replication": [[0, 1], [0, 2]]}, UnsupportedError, "layer_replication"),
        ({"use_something_new": True}, UnsupportedError, "use_something_new"),
        ({"use_dora": True}, CheckpointError, "magnitudes"),
        ({"alpha_pattern": {"(a+)+b": 2}}, UnsupportedError, "alpha_pattern"),
        ({"alpha_pattern": {"(": 2}}, CheckpointError, "no pattern"),
        ({"lora_alpha": "16"}, CheckpointError, "lora_alpha"),
        ({"alpha_pattern": ["o_proj"]}, CheckpointError, "alpha_pattern"),
        ({"trainable_token_indices": 5}, CheckpointError, "trainable_token_indices"),
        ({"modules_to_save": "lm_head"}, CheckpointError, "modules_to_save"),
    ],
)
def test_what_cannot_be_merged_is_refused_by_name(fields, error, why, base, tmp_path):
    adapter = train(base, tmp_path / "adapter", target_modules=ALL)
    edit(adapter / "adapter_config.json", **fields)
    with pytest.raises(error, match=why):
        adapted(open_checkpoint(base), adapter)


def test_damaged_and_foreign_adapters(base, tmp_path):
    checkpoint = open_checkpoint(base)
    adapter = train(base, tmp_path / "adapter", target_modules=ALL)
    path = adapter / "adapter_model.safetensors"
    weights = load_file(path)
    first = next(name for name in weights if "lora_B" in name)

    def refused(change, why):
        save_file(change, path)
        with pytest.raises(CheckpointError, match=why):
            adapted(checkpoint, adapter)

    refused({**weights, first: weights[first][:-1].contiguous()}, "its own base")
    refused({**weights, first: torch.zeros(0)}, "ZeRO-3")
    partner = first.replace("lora_B", "lora_A")
    rankless = {first: weights[first][:, :0].contiguous(), partner: weights[partner][:0].contiguous()}
    refused({**weights, **rankless}, "its own base")
    norm = "base_model.model.model.norm.lora_{}.weight"
    refused({**weights, norm.format("A"): torch.zeros(4, 192), norm.format("B"): torch.zeros(192, 4)}, "fits no tensor")
    refused({name.replace("layers.1", "layers.9"): w for name, w in weights.items()}, "fits no tensor")
    refused({name: w for name, w in weights.items() if name != first}, "fits no tensor")
    refused({name.removeprefix("base_model."): w for name, w in weights.items()}, "no name that PEFT gives")
    refused({name: w.to(torch.int32) for name, w in weights.items()}, "type I32")
    save_file({name: torch.full_like(w, torch.nan) for name, w in weights.items()}, path)
    done = run("phi-export", "--int4", "--fast", base, "--adapter", adapter, "--out", tmp_path / "out")
    assert done.returncode == 2 and "NaN" in done.stderr and not (tmp_path / "out").exists()
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="truncated"):
        adapted(checkpoint, adapter)
    path.unlink()
    (adapter / "adapter_model.bin").write_bytes(b"pickle")
    with pytest.raises(CheckpointError, match="pickle"):
        adapted(checkpoint, adapter)
    with pytest.raises(NotFoundError, match=r"adapter_config\.json"):
        adapted(checkpoint, base)
