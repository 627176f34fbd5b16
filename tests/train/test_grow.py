"""Larger models begun with smaller ones."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from support import run

from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.architecture.config import parse_config
from phi_runtime.errors import UsageError
from phi_train.checkpoints.grow import grow
from phi_train.checkpoints.write import write_checkpoint
from phi_train.models import build

PHI3 = {
    "model_type": "phi3", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "sliding_window": 20,
    "original_max_position_embeddings": 128, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "rope_theta": 10000.0,
}  # fmt: skip
PHI = {
    "model_type": "phi", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3,
    "num_attention_heads": 4, "max_position_embeddings": 128, "partial_rotary_factor": 0.5, "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 10000.0,
}  # fmt: skip
NEO = {
    "model_type": "gpt_neo", "vocab_size": 300, "hidden_size": 64, "num_layers": 2, "num_heads": 4,
    "max_position_embeddings": 128, "window_size": 32, "attention_types": [[["global", "local"], 1]],
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


@pytest.fixture
def small(request, tmp_path, checkpoint):
    """A checkpoint with weights that say something, in float32's values of bfloat16."""
    config = parse_config(request.param, Path("config.json"))
    model = build(config)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.15) if p.ndim == 2 else p.add_(0.1 * torch.randn(p.shape))
    write_checkpoint(tmp_path / "small", config, dict(model.named_parameters()), checkpoint)
    return tmp_path / "small", config


def logits(folder):
    opened = open_checkpoint(folder)
    model = build(opened.config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(np.array(opened.read(name))).view(p.shape))
        ids = torch.randint(0, 300, (1, 60), generator=torch.Generator().manual_seed(2))
        return model(ids)[0]


@pytest.mark.parametrize("small", [PHI3, PHI], indirect=True, ids=["phi3", "phi"])
@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_preserved_it_says_the_same(small, noise, tmp_path):
    folder, config = small
    wide = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 8}
    large = replace(config, **wide, num_key_value_heads=2 * config.num_key_value_heads, num_hidden_layers=5)
    grow(folder, large, "preserve", tmp_path / "large", noise)
    before, after = logits(folder), logits(tmp_path / "large")
    assert before.std() > 0.3
    limit = 1e-4 if not noise else 0.05  # what is stored in bfloat16 no longer cancels out to the last bit
    assert (before - after).abs().max() < limit * max(1.0, float(before.std()))
    weights = open_checkpoint(tmp_path / "large").read(
        "model.layers.0.mlp.down_proj.weight" if config.model_type == "phi3" else "model.layers.0.mlp.fc2.weight"
    )
    assert (np.array_equal(weights[:, :96], weights[:, 96:192])) == (noise == 0)


@pytest.mark.parametrize("small", [PHI3, PHI, NEO], indirect=True, ids=["phi3", "phi", "gpt_neo"])
def test_every_way_fills_every_tensor(small, tmp_path):
    folder, config = small
    if config.model_type == "gpt_neo":
        large = replace(
            config,
            hidden_size=96,
            intermediate_size=384,
            num_layers=3,
            num_heads=6,
            attention_layers=("global", "local", "global"),
        )
    else:
        large = replace(
            config,
            hidden_size=96,
            intermediate_size=128,
            num_attention_heads=6,
            num_key_value_heads=6,
            num_hidden_layers=4,
        )
    first = next(iter(config.tensor_shapes()))
    original = open_checkpoint(folder).read(first)
    for method in ("random", "reuse", "tile"):
        grow(folder, large, method, tmp_path / method)
        grown = open_checkpoint(tmp_path / method)
        assert {n: t.shape for n, t in grown.tensors.items()} == large.tensor_shapes()
        corner = grown.read(first)[:, :64]
        assert np.array_equal(corner, original) == (method != "random")
        rest = grown.read(first)[:, 64:]
        assert np.array_equal(rest, original[:, :32]) == (method == "tile")
        assert logits(tmp_path / method).isfinite().all()


@pytest.mark.parametrize("small", [PHI3], indirect=True, ids=["phi3"])
def test_what_cannot_be_grown(small, tmp_path):
    folder, config = small
    for changes, says in (
        ({"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 2}, "no multiple"),
        ({"num_hidden_layers": 2}, "fewer"),
        ({"vocab_size": 400}, "300 tokens, not 400"),
        ({"hidden_size": 128}, "heads of 32"),
    ):
        with pytest.raises(UsageError, match=says):
            grow(folder, replace(config, **changes), "preserve", tmp_path / "out")
    with pytest.raises(UsageError, match="none of random"):
        grow(folder, config, "stretch", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    done = run("phi-train", "grow", folder, "--into", "phi2", "--method", "tile", "--out", tmp_path / "out")
    assert done.returncode == 2 and "model_type phi3, not phi" in done.stderr
