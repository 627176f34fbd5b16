"""Every architecture against transformers, or where that has no class, against its written definition."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from torch.utils._python_dispatch import TorchDispatchMode

from phi_runtime.architecture.config import num_parameters, parse_config
from phi_runtime.backends.reference import Reference
from phi_train.models import build
from phi_train.models.attention import AttentionContext
from phi_train.models.initializer import init_weights
from phi_train.models.recompute import recompute
from phi_train.recipes.published import PUBLISHED

PHI3 = {
    "model_type": "phi3", "vocab_size": 300, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 192, "sliding_window": None,
    "original_max_position_embeddings": 192, "tie_word_embeddings": False, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "rope_theta": 10000.0,
}  # fmt: skip
PHI = {
    "model_type": "phi", "vocab_size": 300, "hidden_size": 128, "intermediate_size": 160, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 192, "partial_rotary_factor": 0.5, "hidden_act": "gelu_new",
    "layer_norm_eps": 1e-5, "bos_token_id": 1, "eos_token_id": 2, "rope_theta": 10000.0,
}  # fmt: skip
NEO = {
    "model_type": "gpt_neo", "vocab_size": 300, "hidden_size": 128, "num_layers": 4, "num_heads": 16,
    "max_position_embeddings": 192, "window_size": 32, "attention_types": [[["global", "local"], 2]],
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
SHORT, LONG = [1.0 + 0.02 * i for i in range(16)], [1.0 + 0.4 * i for i in range(16)]
ROPE = {"type": "longrope", "short_factor": SHORT, "long_factor": LONG}
LONG_MINI = PHI3 | {"max_position_embeddings": 16384, "original_max_position_embeddings": 4096, "rope_scaling": ROPE}
SYSTEMS = {
    "phi3": (PHI3, 120),
    "phi3, medium: grouped queries": (PHI3 | {"num_key_value_heads": 1}, 120),
    "phi3, window": (PHI3 | {"sliding_window": 40}, 120),
    "phi3, 4-mini: partial, tied, grouped": (
        PHI3 | {"partial_rotary_factor": 0.75, "tie_word_embeddings": True, "num_key_value_heads": 2,
                "max_position_embeddings": 640, "original_max_position_embeddings": 100,
                "rope_scaling": ROPE | {"short_factor": SHORT[:12], "long_factor": LONG[:12]}},
        120,
    ),
    **{f"phi3, longrope, {n} tokens": (LONG_MINI, n) for n in (4095, 4096, 4097)},
    **{f"phi3, window of 2047, {n} tokens": (PHI3 | {"max_position_embeddings": 4096, "sliding_window": 2047,
                                                     "original_max_position_embeddings": 4096}, n)
       for n in (2046, 2047, 2048, 2049)},
    "phi-1.5": (PHI, 120),
    "phi-2: heads of 80": (PHI | {"hidden_size": 320, "partial_rotary_factor": 0.4}, 120),
    "TinyStories": (NEO, 120),
}  # fmt: skip
SMALL = {
    "model_type": "phi3small", "vocab_size": 300, "hidden_size": 256, "ff_intermediate_size": 160,
    "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "layer_norm_epsilon": 1e-5, "rope_embedding_base": 1000000, "gegelu_limit": 2.0, "hidden_act": "gegelu",
    "blocksparse_block_size": 8, "blocksparse_num_local_blocks": 2, "blocksparse_vert_stride": 4,
    "dense_attention_every_n_layers": 2, "mup_width_multiplier": 8.0, "mup_embedding_multiplier": 10.0,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
COUNTS = {
    "phi3-mini-4k": 3_821_079_552, "phi3-mini-128k": 3_821_079_552, "phi3-medium-4k": 13_960_238_080,
    "phi2": 2_779_683_840, "phi15": 1_418_270_720,
}  # fmt: skip


def drawn(raw, seed=0):
    """A model with weights large enough for its logits to say something."""
    config = parse_config(raw, Path("config.json"))
    model = build(config)
    init_weights(model, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0.0, 0.07) if p.ndim == 2 else p.add_(0.1 * torch.randn(p.shape))
    return model


@pytest.mark.parametrize("name", SYSTEMS)
def test_logits_are_those_of_transformers(name):
    raw, length = SYSTEMS[name]
    model = drawn(raw)
    theirs = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**json.loads(json.dumps(raw))), attn_implementation="eager"
    ).eval()
    theirs.load_state_dict(model.state_dict(), strict="tie" not in json.dumps(raw) and raw["model_type"] != "gpt_neo")
    ids = torch.randint(0, 300, (1, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, expected = model(ids)[0], theirs(ids).logits[0]
    assert expected.std() > 0.3, "logits this flat would prove nothing"
    assert (ours - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_as_many_as_published(name):
    config = PUBLISHED[name]()
    with torch.device("meta"):
        model = build(config)
    assert sum(p.numel() for p in model.parameters()) == num_parameters(config) == COUNTS[name]
    assert {n: tuple(p.shape) for n, p in model.named_parameters()} == config.tensor_shapes()


def test_phi3_small_is_its_written_definition():
    model = drawn(SMALL)
    weights = {n: p.detach().numpy() for n, p in model.named_parameters()}
    ids = torch.randint(0, 300, (1, 150), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = model(ids)[0].numpy()
    read = lambda name, start=0, stop=None: weights[name][start:stop]  # noqa: E731
    expected = Reference(model.decoder, read, 0).forward(ids[0].tolist(), True)[0]
    assert expected.std() > 0.1
    assert np.abs(ours - expected).max() <= 1e-4


def test_over_as_many_heads_as_the_stride_every_key_is_seen():
    decoder = parse_config(SMALL | {"blocksparse_vert_stride": 8}, Path("config.json")).decoder()
    sparse, dense = decoder.layers[0], decoder.layers[1]
    context = AttentionContext(decoder, 200, torch.device("cpu"))
    seen = context.mask(sparse)[0]
    assert context.mask(dense) is None
    causal = torch.ones(200, 200, dtype=torch.bool).tril()
    assert torch.equal(seen.any(0), causal) and not torch.equal(seen[0], causal)
    assert all(bool(head.diagonal().all()) for head in seen)


def test_documents_do_not_see_each_other():
    for raw in (PHI3, PHI, PHI3 | {"sliding_window": 5}, SMALL):
        model = drawn(raw)
        ids = torch.randint(0, 300, (1, 60), generator=torch.Generator().manual_seed(2))
        documents = (torch.arange(60) >= 25).long()[None]
        with torch.no_grad():
            apart = model(ids, documents)[0]
            # Rotary positions count distances, so the second document alone says the same.
            alone = model(ids[:, 25:])[0] if raw is not SMALL else None
            assert torch.allclose(apart[:25], model(ids[:, :25])[0], atol=1e-4)
        assert alone is None or torch.allclose(apart[25:], alone, atol=1e-4)


def test_phi2s_scores_do_not_overflow_in_float16():
    model = drawn(PHI | {"hidden_size": 320, "partial_rotary_factor": 0.4}).half()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight *= 60
            layer.self_attn.k_proj.weight *= 60
        ids = torch.randint(0, 300, (1, 50), generator=torch.Generator().manual_seed(2))
        q = layer.self_attn.q_proj(torch.ones(1, 1, 320, dtype=torch.float16))
        assert q.isfinite().all() and float(q.float().square().sum() / 4) > 65504, "this would not have overflowed"
        assert model(ids).isfinite().all()


def test_a_text_beyond_the_context_is_refused():
    with pytest.raises(ValueError, match="193 tokens"):
        drawn(PHI3)(torch.zeros(1, 193, dtype=torch.long))


def test_weights_are_drawn_by_the_seed():
    a, b, c = (drawn(PHI, 0), drawn(PHI, 0), build(replace(PUBLISHED["phi15"](), vocab_size=300, num_hidden_layers=1)))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))
    init_weights(c, 3)
    assert abs(float(c.model.embed_tokens.weight.std()) - 0.02) < 2e-4
    assert not c.lm_head.bias.any() and bool((c.model.final_layernorm.weight == 1).all())


@pytest.mark.parametrize("raw", [PHI3, PHI, NEO, SMALL], ids=["phi3", "phi", "gpt_neo", "small"])
def test_weights_drawn_by_fan_in(raw):
    """An embedding of its own is 1, a matrix and a tied embedding n^-1/2; a model's logits are then about 1."""
    model = build(parse_config(raw, Path("config.json")))
    init_weights(model, 0, "fan_in")
    for name, p in model.named_parameters():
        if p.ndim == 2:
            own = name.endswith("embed_tokens.weight") and not model.config.decoder().tied
            assert float(p.std()) == pytest.approx(1.0 if own else p.shape[1] ** -0.5, rel=0.05), name
        else:
            assert bool((p == (0.0 if name.endswith(".bias") else 1.0)).all()), name
    ids = torch.randint(0, 300, (2, 60), generator=torch.Generator().manual_seed(3))
    scale = getattr(model.decoder, "logit_scale", 1.0)
    assert 0.5 < float(model(ids).std()) / scale < 2


@pytest.mark.parametrize(
    "raw", [PHI3 | {"sliding_window": 40}, PHI, NEO, SMALL], ids=["phi3", "phi", "gpt_neo", "small"]
)
def test_checkpointed_activations_give_the_same_gradients(raw):
    ids = torch.randint(0, 300, (2, 60), generator=torch.Generator().manual_seed(3))
    found = []
    for again in (False, "selective", True):
        model = drawn(raw)
        model.dropout = 0.1
        recompute(model, again)
        torch.manual_seed(5)
        with Products() as products:
            loss = model(ids).square().mean()
            products.count = 0
            loss.backward()
        found.append(([p.grad for p in model.parameters()], products.count))
    kept, selective, whole = found
    assert all(torch.equal(a, b) for a, b in zip(kept[0], selective[0], strict=True))
    assert all(torch.equal(a, b) for a, b in zip(kept[0], whole[0], strict=True))
    assert kept[1] == selective[1] < whole[1]  # products with weights are not computed again


class Products(TorchDispatchMode):
    """Counts products of matrices."""

    count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += operation in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
        return operation(*args, **(kwargs or {}))


@pytest.mark.parametrize("raw", [PHI3, PHI, NEO, SMALL], ids=["phi3", "phi", "gpt_neo", "small"])
def test_dropout_is_for_training_alone(raw):
    model = drawn(raw)
    model.dropout = 0.2
    ids = torch.randint(0, 300, (1, 60), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        assert not torch.equal(model(ids), model(ids))
        model.eval()
        assert torch.equal(model(ids), model(ids))


def test_a_model_is_trained_after_one_of_its_shape_was_asked():
    tokens = torch.randint(0, 300, (1, 77))  # a length that no other test has
    model = drawn(PHI3)
    with torch.inference_mode():
        model(tokens)
    model(tokens).sum().backward()
