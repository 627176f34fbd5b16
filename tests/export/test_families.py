"""Every family and odd configuration, small, through every format that carries it, against transformers' logits."""

import json

import numpy as np
import pytest
import torch
import transformers
from support import any_scales, feedback_noise, run

import phi_runtime
from phi_export.calibrate.calibration import CalibrationText, calibrate
from phi_export.calibrate.equalise import equalised
from phi_export.calibrate.forward import TorchDecoder
from phi_export.calibrate.text import calibration_windows
from phi_export.defaults import WINDOW
from phi_export.formats import get_format, tensor_groups
from phi_export.verify.manifest import describe_source
from phi_export.verify.metrics import Agreement
from phi_export.verify.verification import verify
from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.architecture.config import parse_config
from phi_runtime.backends.reference import Reference
from phi_runtime.package.manifest import ExportOptions, read_manifest
from phi_train.checkpoints.init import _pieces
from phi_train.data.tokenizer import build_tokenizer, tokenizer_config

pytestmark = pytest.mark.integration

VOCAB = 700
PHI3 = {
    "model_type": "phi3", "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 192, "sliding_window": None,
    "original_max_position_embeddings": 192, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "rope_theta": 10000.0,
}  # fmt: skip
PHI = {
    "model_type": "phi", "vocab_size": VOCAB, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 192, "partial_rotary_factor": 0.5, "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 10000.0,
}  # fmt: skip
NEO = {
    "model_type": "gpt_neo", "vocab_size": VOCAB, "hidden_size": 256, "num_layers": 4, "num_heads": 16,
    "max_position_embeddings": 192, "window_size": 32,
    "attention_types": [[["global", "local"], 2]], "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHORT, LONG = [1.0 + 0.02 * i for i in range(32)], [1.0 + 0.4 * i for i in range(32)]
LONGROPE = {"short_factor": SHORT, "long_factor": LONG}
STRETCHED = PHI3 | {"max_position_embeddings": 640, "original_max_position_embeddings": 256}
SYSTEMS = {
    "mini": PHI3,
    "mini, window": PHI3 | {"sliding_window": 40},
    "medium: grouped queries": PHI3 | {"num_key_value_heads": 1},
    "128k: longrope": STRETCHED | {"rope_scaling": {"type": "longrope", **LONGROPE}},
    "128k of April: su": STRETCHED | {"rope_scaling": {"type": "su", **LONGROPE}},
    "128k, rope_type": STRETCHED | {"rope_scaling": {"rope_type": "longrope", **LONGROPE}},
    "128k of transformers 5": STRETCHED
    | {"rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0,
                           "original_max_position_embeddings": 256, **LONGROPE}},
    "4-mini: partial rotary, tied, grouped": STRETCHED
    | {"partial_rotary_factor": 0.75, "tie_word_embeddings": True, "num_key_value_heads": 2,
       "rope_scaling": {"type": "longrope", "short_factor": SHORT[:24], "long_factor": LONG[:24]}},
    "phi-1.5": PHI,
    "phi-2: heads of 80": PHI | {"hidden_size": 320, "intermediate_size": 640, "partial_rotary_factor": 0.4},
    "TinyStories": NEO,
}  # fmt: skip
FORMATS = {
    "phi3": ("gguf", "onnx", "coreml", "mlx"),
    "phi": ("gguf", "onnx", "coreml", "mlx"),
    "gpt_neo": ("onnx", "coreml"),
}


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer(_pieces(VOCAB - 3 - 256 - 11))


def make(folder, raw, tokenizer):
    """A checkpoint of random weights as transformers itself saves it, and transformers' model."""
    torch.manual_seed(3)
    # transformers 5 no longer reads `su` itself; the weights and the computation are the same.
    config = transformers.AutoConfig.for_model(**json.loads(json.dumps(raw).replace('"su"', '"longrope"')))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.normal_(1.0 if p.ndim == 1 and name.endswith("weight") else 0.0, 0.1 if p.ndim == 1 else 0.06)
    model.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(raw))  # as published, not as this version of transformers spells it
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(tokenizer)))
    return model


@pytest.mark.parametrize("name", SYSTEMS)
def test_every_system(name, tokenizer, tmp_path):
    raw = SYSTEMS[name]
    model = make(tmp_path / "ckpt", raw, tokenizer)
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    assert parse_config(checkpoint.config.to_json(), tmp_path) == checkpoint.config
    rng = np.random.default_rng(0)
    # Longer than a window; on both sides of the crossover between LongRoPE's factors.
    decoder = checkpoint.config.decoder()
    long = decoder.rope is not None and bool(decoder.rope.long)
    texts = [rng.integers(3, VOCAB, n).tolist() for n in ((256, 300) if long else (150,))]
    with torch.no_grad():
        exact = [model(torch.tensor([t])).logits[0].float().numpy() for t in texts]
    for text, expected in zip(texts, exact, strict=True):
        ours = Reference(decoder, checkpoint.read, 0).forward(text, True)[0]
        assert np.abs(ours - expected).max() <= 1e-4
        assert expected.std() > 0.3, "logits this flat would prove nothing"

    formats = FORMATS[raw["model_type"]]
    done = run(
        "phi-export", "--int4", "--fast", tmp_path / "ckpt", "--out", tmp_path / "out", "--format", ",".join(formats),
        "--tokens", 40,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for kind in formats:
        bundle = tmp_path / "out" / kind
        for text in texts:
            outcome = verify(bundle, checkpoint, text)
            assert outcome.passed, (kind, len(text), [c for c in outcome.checks if not c.passed])
            # The reference on the bundle's own weights is the model that transformers would make of them.
            assert outcome.parity.logit_error < 0.04, (kind, len(text))


SMALL = {
    "model_type": "phi3small", "vocab_size": VOCAB, "hidden_size": 256, "ff_intermediate_size": 256,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 192,
    "hidden_act": "gegelu", "gegelu_limit": 2.0, "mup_use_scaling": True, "mup_attn_multiplier": 1.0,
    "mup_embedding_multiplier": 10.0, "mup_width_multiplier": 8.0, "blocksparse_block_size": 8,
    "blocksparse_homo_head_pattern": False, "blocksparse_num_local_blocks": 2, "blocksparse_vert_stride": 8,
    "dense_attention_every_n_layers": 2, "bos_token_id": 1, "eos_token_id": 2,
    "dummy_token_indices": [5, 6],
}  # fmt: skip


def phi3small(raw, weights, ids):
    """phi-3-small in torch, written from its published definition alone: transformers has no class for it."""
    heads, groups, T = raw["num_attention_heads"], raw["num_key_value_heads"], len(ids)
    D = raw["hidden_size"] // heads

    def linear(x, name):
        return torch.nn.functional.linear(x, weights[name + ".weight"], weights[name + ".bias"])

    def norm(x, name):
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weights[name + ".weight"], weights[name + ".bias"], 1e-5)

    angles = torch.arange(T)[:, None] * 1e6 ** (-torch.arange(0, D, 2) / D)[None]
    cos, sin = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)

    def rotate(x):
        return x * cos + torch.cat([-x[..., D // 2 :], x[..., : D // 2]], -1) * sin

    block = torch.arange(T) // raw["blocksparse_block_size"]
    causal = torch.arange(T)[:, None] >= torch.arange(T)[None]
    local = block[:, None] - block[None] < raw["blocksparse_num_local_blocks"]
    stripes = torch.stack([(block + h + 1) % raw["blocksparse_vert_stride"] == 0 for h in range(heads)])
    sparse = causal & (local[None] | stripes[:, None])
    assert (sparse.any(0) == causal).all(), "the union over the heads of one turn is dense"

    x = weights["model.embed_tokens.weight"][ids] * raw["mup_embedding_multiplier"]
    for n in range(raw["num_hidden_layers"]):
        p = f"model.layers.{n}."
        qkv = linear(norm(x, p + "input_layernorm"), p + "self_attn.query_key_value")
        qkv = qkv.view(T, groups, heads // groups + 2, D)
        q = rotate(qkv[:, :, :-2].reshape(T, heads, D).transpose(0, 1))
        k, v = (qkv[:, :, i].transpose(0, 1).repeat_interleave(heads // groups, 0) for i in (-2, -1))
        scores = q @ rotate(k).transpose(1, 2) * raw["mup_attn_multiplier"] / D
        mask = causal.expand(heads, T, T) if (n + 1) % 2 == 0 else sparse
        out = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ v
        x = x + linear(out.transpose(0, 1).reshape(T, -1), p + "self_attn.dense")
        hidden = linear(norm(x, p + "post_attention_layernorm"), p + "mlp.up_proj")
        gate = hidden[..., ::2].clamp(max=raw["gegelu_limit"])
        straight = hidden[..., 1::2].clamp(-raw["gegelu_limit"], raw["gegelu_limit"])
        x = x + linear(gate * torch.sigmoid(1.702 * gate) * (straight + 1), p + "mlp.down_proj")
    return norm(x, "model.final_layernorm") @ weights["model.embed_tokens.weight"].T / raw["mup_width_multiplier"]


def test_phi_3_small(tokenizer, tmp_path):
    from safetensors.torch import save_file

    config = parse_config(SMALL, tmp_path / "config.json")
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for name, shape in config.tensor_shapes().items():
        weights[name] = torch.randn(shape, generator=generator) * 0.1
        if "layernorm.weight" in name:
            weights[name] += 1
    folder = tmp_path / "ckpt"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(SMALL))
    tokenizer.save(str(folder / "tokenizer.json"))
    checkpoint = open_checkpoint(folder)
    assert parse_config(checkpoint.config.to_json(), tmp_path) == checkpoint.config
    text = np.random.default_rng(0).integers(3, VOCAB, 150).tolist()
    expected = phi3small(SMALL, weights, text).numpy()
    ours = Reference(checkpoint.config.decoder(), checkpoint.read, 0).forward(text, True)[0]
    assert np.abs(ours - expected).max() <= 1e-4
    assert expected.std() > 0.05

    done = run("phi-export", "--int4", "--fast", folder, "--out", tmp_path / "out", "--format", "onnx,coreml")
    assert done.returncode == 0, done.stderr
    for kind in ("onnx", "coreml"):
        outcome = verify(tmp_path / "out" / kind, checkpoint, text)
        assert outcome.passed, [c for c in outcome.checks if not c.passed]
        assert outcome.parity.logit_error < 0.04
    done = run("phi-export", "--int4", "--fast", folder, "--out", tmp_path / "no")
    assert done.returncode == 2
    assert "llama.cpp has no architecture for model_type 'phi3small'" in done.stderr


@pytest.mark.parametrize("name", ["medium: grouped queries", "phi-2: heads of 80"])
def test_moved_scales_change_nothing(name, tokenizer, tmp_path):
    """Any exponents, where those of a calibrated random model are nearly all zero."""
    make(tmp_path / "ckpt", SYSTEMS[name], tokenizer)
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    d = checkpoint.config.decoder()
    text = np.random.default_rng(1).integers(3, VOCAB, 40).tolist()
    plain, moved = (
        Reference(d, c.read, 0).forward(text, True)[0] for c in (checkpoint, equalised(checkpoint, any_scales(d)))
    )
    np.testing.assert_allclose(moved, plain, atol=1e-3 * plain.std())


@pytest.mark.parametrize("name", SYSTEMS)
def test_pytorch_computes_what_the_reference_does(name, tokenizer, tmp_path):
    make(tmp_path / "ckpt", SYSTEMS[name], tokenizer)
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    decoder = checkpoint.config.decoder()
    text = np.random.default_rng(3).integers(3, VOCAB, min(180, decoder.context)).tolist()
    expected = Reference(decoder, checkpoint.read, 0).forward(text, True)[0]
    model = TorchDecoder(decoder, checkpoint.read, len(text))
    with torch.no_grad():
        x = model.embed([text, text[::-1]])
        for n, layer in enumerate(decoder.layers):
            x = model.layer(n, x, model.weights(*layer.linears()))
        found = model.logits(x[:1], model.weights(decoder.head))[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-3 * expected.std())


@pytest.mark.parametrize(
    "name", ["medium: grouped queries", "4-mini: partial rotary, tied, grouped", "phi-2: heads of 80", "TinyStories"]
)
def test_calibration_finds_every_matrix(name, tokenizer, tmp_path):
    """What an error of a matrix is said to cost, by one backward pass, is what it costs when the weights have it."""
    raw = SYSTEMS[name]
    make(tmp_path / "ckpt", raw, tokenizer)
    checkpoint = open_checkpoint(tmp_path / "ckpt")
    wanted = CalibrationText(windows=4)
    calibration = calibrate(checkpoint, describe_source(checkpoint), wanted)
    texts = calibration_windows(checkpoint, wanted.text, 4, min(WINDOW, raw["max_position_embeddings"]))
    scaled = equalised(checkpoint, calibration.scales)
    exact = [Reference(checkpoint.config.decoder(), checkpoint.read, 0).forward(text, True)[0] for text in texts]
    same = [Reference(checkpoint.config.decoder(), scaled.read, 0).forward(text, True)[0] for text in texts]
    np.testing.assert_allclose(same, exact, atol=2e-4 * np.std(exact))  # moved scales change nothing
    size = 1e-3
    said, found = [], []
    for item in tensor_groups(checkpoint.config, ExportOptions(split_qkv=True)):
        if item.role in ("vector", "embedding"):
            continue
        erring = scaled.read(item.tensor).copy()
        factor = calibration.factor(item.tensor)
        random = np.random.default_rng(list(item.name.encode()))
        erring[item.start : item.stop] += feedback_noise(factor, size, erring[item.start : item.stop], random)

        def read(name, start=0, stop=None, item=item, erring=erring):
            return erring[start:stop] if name == item.tensor else scaled.read(name, start, stop)

        agreement = Agreement()
        for text, logits in zip(texts, exact, strict=True):
            agreement.add(logits, Reference(checkpoint.config.decoder(), read, 0).forward(text, True)[0], text[1:])
        said.append(calibration.sensitivity[item.name] * size)
        found.append(agreement.kld_mean)
    ratios = np.array(said) / np.array(found)
    assert np.all((ratios > 0.5) & (ratios < 2)), ratios.round(2)
    assert abs(np.log(ratios)).mean() < 0.25, ratios.round(2)
    done = run("phi-export", "--int4", tmp_path / "ckpt", "--out", tmp_path / "out", "--format", "onnx,coreml",
               "--calibrate", "built-in", "--windows", 4)  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_format_that_cannot_carry_a_model_says_so_first(tokenizer, tmp_path):
    make(tmp_path / "ckpt", NEO, tokenizer)
    done = run("phi-export", "--int4", "--fast", tmp_path / "ckpt", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "llama.cpp has no architecture for model_type 'gpt_neo'" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("kind", ["gguf", "onnx", "coreml"])
def test_longrope_changes_its_factors_where_it_should(kind, tokenizer, tmp_path):
    """Token by token over the crossover: the whole text is read again with the long factors, as the reference does."""
    make(tmp_path / "ckpt", SYSTEMS["128k: longrope"], tokenizer)
    done = run("phi-export", "--int4", "--fast", tmp_path / "ckpt", "--out", tmp_path / "out", "--format", kind)
    assert done.returncode == 0, done.stderr
    bundle = tmp_path / "out" / kind
    manifest = read_manifest(bundle)
    decoder, read = manifest.config().decoder(), get_format(kind).read(bundle, manifest)
    text = np.random.default_rng(1).integers(3, VOCAB, 262).tolist()

    def exact(length):
        return Reference(decoder, read, 0).forward(text[:length], all_logits=False)[0]

    def close(a, b):
        return np.sqrt(np.square(a - b).mean()) < 0.06 * b.std()  # K types round activations in blocks of 256

    with phi_runtime.load(bundle) as phi:
        backend = phi.engine.backend
        backend.forward(text[:254], all_logits=False)
        for length in (255, 256, 257, 258):
            assert close(backend.forward([text[length - 1]], all_logits=False), exact(length)), length
        backend.trim(250)  # and back
        assert close(backend.forward(text[250:255], all_logits=False), exact(255))
        assert close(backend.forward(text[255:262], all_logits=False), exact(262))
