"""Every family and odd configuration, small, through every format that carries it, against transformers' logits."""

import json

import numpy as np
import pytest
import torch
import transformers
from support import run

from phi_export.verify import verify
from phi_runtime.backends.reference import Reference
from phi_runtime.checkpoint import open_checkpoint
from phi_runtime.config import parse_config
from phi_train.init import _pieces
from phi_train.tokenizer import build_tokenizer, tokenizer_config

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
FORMATS = {"phi3": ("gguf", "onnx", "coreml"), "phi": ("gguf", "onnx", "coreml"), "gpt_neo": ("onnx", "coreml")}


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
    # Lengths on both sides of a window, and of the crossover between LongRoPE's factors.
    decoder = checkpoint.config.decoder()
    long = decoder.rope is not None and bool(decoder.rope.long)
    texts = [rng.integers(3, VOCAB, n).tolist() for n in ((256, 257, 300) if long else (39, 41, 150))]
    with torch.no_grad():
        exact = [model(torch.tensor([t])).logits[0].float().numpy() for t in texts]
    for text, expected in zip(texts, exact, strict=True):
        ours = Reference(decoder, checkpoint.read, 0).forward(text, True)[0]
        assert np.abs(ours - expected).max() <= 1e-4
        assert expected.std() > 0.3, "logits this flat would prove nothing"

    formats = FORMATS[raw["model_type"]]
    done = run("phi-export", "--int4", tmp_path / "ckpt", "--out", tmp_path / "out", "--format", ",".join(formats))
    assert done.returncode == 0, done.stderr
    for kind in formats:
        bundle = tmp_path / "out" / kind
        for text in texts:
            outcome = verify(bundle, checkpoint, text)
            assert outcome.passed, (kind, len(text), [c for c in outcome.checks if not c.passed])
            # The reference on the bundle's own weights is the model that transformers would make of them.
            assert outcome.parity.logit_error < 0.04, (kind, len(text))


def test_a_format_that_cannot_carry_a_model_says_so_first(tokenizer, tmp_path):
    make(tmp_path / "ckpt", NEO, tokenizer)
    done = run("phi-export", "--int4", tmp_path / "ckpt", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "llama.cpp has no architecture for model_type 'gpt_neo'" in done.stderr
    assert not (tmp_path / "out").exists()

    (tmp_path / "ckpt" / "config.json").write_text(json.dumps(NEO | {"model_type": "phi3small"}))
    done = run("phi-export", "--int4", tmp_path / "ckpt", "--out", tmp_path / "out")
    assert done.returncode == 2
    assert "phi3small" in done.stderr
