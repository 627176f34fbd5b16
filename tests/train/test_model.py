import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.architecture.config import num_parameters, parse_config
from phi_runtime.backends.reference import ReferenceBackend
from phi_train.models.phi3 import Phi3ForCausalLM
from phi_train.recipes.published import PUBLISHED, phi3_mini_4k


def published(**changes):
    """phi-3-mini-4k-instruct's configuration."""
    return dataclasses.replace(phi3_mini_4k(), **changes)


@pytest.mark.parametrize(
    ("name", "count"),
    {
        "phi3-mini-4k": 3_821_079_552,
        "phi3-mini-128k": 3_821_079_552,
        "phi3-medium-4k": 13_960_238_080,
        "phi2": 2_779_683_840,
        "phi15": 1_418_270_720,
    }.items(),
)
def test_published_architectures_have_the_published_counts(name, count):
    config = PUBLISHED[name]()
    assert num_parameters(config) == count
    assert parse_config(config.to_json(), Path("config.json")) == config
    rope = config.decoder().rope
    if name == "phi3-mini-128k":
        assert len(rope.long) == len(rope.short) == 48
        assert rope.attention_factor == pytest.approx(1.190238)


def test_the_checkpoint_opens_in_transformers_with_our_logits(checkpoint, tokens):
    piece = tokens[:300]
    ids = torch.tensor([piece])
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    opened = open_checkpoint(checkpoint)
    ours = Phi3ForCausalLM(opened.config)
    ours.load_state_dict({n: w.float() for n, w in load_file(checkpoint / "model.safetensors").items()})
    with torch.no_grad():
        expected = theirs(ids).logits[0].numpy()
        assert np.abs(ours(ids)[0].numpy() - expected).max() <= 1e-4
    reference = ReferenceBackend(opened.config.decoder(), opened.read).forward(piece, all_logits=True)
    assert np.abs(reference - expected).max() <= 1e-4
    assert expected.std() > 0.5, "logits this flat would prove nothing"


@pytest.mark.parametrize(
    ("kv_heads", "window", "theta"), list(itertools.product((1, 2, 4), (None, 5, 100), (10000.0, 250000.0)))
)
def test_every_shape_agrees_with_transformers(kv_heads, window, theta):
    config = published(
        vocab_size=300,
        hidden_size=384,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        max_position_embeddings=256,
        sliding_window=window,
        rope_theta=theta,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(kv_heads)
    model = Phi3ForCausalLM(config)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(1.0 if p.ndim == 1 else 0.0, 0.08)
    raw = {k: v for k, v in config.to_json().items() if k not in ("architectures", "torch_dtype")}
    theirs = transformers.Phi3ForCausalLM(transformers.Phi3Config(**raw))
    theirs.load_state_dict(model.state_dict())
    ids = torch.randint(0, 300, (1, 120))
    with torch.no_grad():
        expected = theirs.eval()(ids).logits[0].numpy()
        assert np.abs(model(ids)[0].numpy() - expected).max() <= 1e-4
    weights = {n: p.detach().numpy() for n, p in model.named_parameters()}

    def read(name, start=0, stop=None):
        return weights[name][start:stop]

    reference = ReferenceBackend(config.decoder(), read).forward(ids[0].tolist(), all_logits=True)
    assert np.abs(reference - expected).max() <= 1e-4


def test_the_tokenizer_opens_in_transformers(checkpoint, text):
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    from phi_runtime.text.tokenizer import Tokenizer

    sample = text.read_text()[:20000]
    assert theirs(sample, add_special_tokens=False)["input_ids"] == Tokenizer(checkpoint).encode(sample)
    chat = theirs.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<|user|>\nHi<|end|>\n<|assistant|>\n"


def test_config_survives_its_json(tmp_path):
    config = published()
    assert parse_config(config.to_json(), tmp_path / "config.json") == config
