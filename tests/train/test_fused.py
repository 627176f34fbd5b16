"""Fewer passes over memory, the same values and gradients as PyTorch's own operations."""

import pytest
import torch
from torch.nn import functional

from phi_train.models import build, fused, head
from phi_train.models.fused import causal_attention, rms_norm, rotate_pairs, swiglu, token_losses
from phi_train.models.recompute import DecoderLayer, recompute
from phi_train.recipes.catalogue import get_recipe

DRAW = torch.Generator().manual_seed(0)


@pytest.fixture(autouse=True, params=[1, fused._VALUES], ids=["parts", "whole"])
def values(request, monkeypatch):
    """Few values at a time, so that there are several parts of so small tensors; and as many as there are."""
    monkeypatch.setattr(fused, "_VALUES", request.param)


def drawn(*shape, dtype=torch.float32):
    return torch.randn(*shape, generator=DRAW).to(dtype).requires_grad_()


def plain_rotate(x, cos, sin):
    a, b, rest = torch.split(x.float(), [cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], -1)


def plain_attention(q, k, v):
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)


def plain_swiglu(x):
    gate, up = x.float().chunk(2, -1)
    return functional.silu(gate) * up


ANGLES = torch.linspace(0, 9, 33 * 4).view(33, 4)
CASES = {
    "norm": (
        lambda x, w: rms_norm(x, w, 1e-5),
        lambda x, w: functional.rms_norm(x.float(), w.shape, w, 1e-5),
        [(2, 150, 24), (24,)],
    ),
    "swiglu": (swiglu, plain_swiglu, [(2, 150, 24)]),
    "rotation of a part": (
        lambda x: rotate_pairs(x, ANGLES.cos(), ANGLES.sin()),
        lambda x: plain_rotate(x, ANGLES.cos(), ANGLES.sin()),
        [(2, 3, 33, 10)],
    ),
    "attention": (
        lambda q, k, v: causal_attention(q, k, v, 0.3), plain_attention, [(2, 3, 33, 8)] * 3
    ),
    "losses": (
        lambda x: token_losses(x, torch.arange(300) % 40),
        lambda x: functional.cross_entropy(x.float(), torch.arange(300) % 40, reduction="none"),
        [(300, 40)],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 3e-6), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name, dtype, most):
    ours, plain, shapes = CASES[name]
    inputs = [drawn(*shape, dtype=torch.float32 if len(shape) == 1 else dtype) for shape in shapes]
    kept = [x.detach().clone() for x in inputs]
    found, expected = ours(*inputs), plain(*inputs)
    assert found.shape == expected.shape and (found.float() - expected.float()).abs().max() < most
    weights = torch.randn(found.shape, generator=DRAW)
    gradients = [torch.autograd.grad((out.float() * weights).sum(), inputs) for out in (found, expected)]
    for one, other in zip(*gradients, strict=True):
        assert one.dtype == other.dtype
        assert (one.float() - other.float()).abs().max() < most * max(1, float(other.abs().max()))
    assert all(torch.equal(x, y) for x, y in zip(inputs, kept, strict=True))  # what they were given stays as it was


@pytest.mark.parametrize("name", ["norm", "swiglu", "rotation of a part"])
def test_what_a_gpu_takes_instead(name, monkeypatch):
    """The same values, and nothing goes through rows."""
    ours, plain, shapes = CASES[name]
    inputs = [drawn(*shape) for shape in shapes]
    here = ours(*inputs)
    monkeypatch.setattr(fused, "_on_processor", lambda x: False)
    for function in (fused._RmsNorm, fused._SwiGlu, fused._Rotate):
        monkeypatch.setattr(function, "apply", None)
    found = ours(*inputs)
    assert (found - here).abs().max() < 3e-6 and (here - plain(*inputs)).abs().max() < 3e-6


@pytest.mark.parametrize("recipe", ["phi1-demo", "phi3-demo", "phi3-small-8k-demo", "tinystories-1m-demo"])
def test_losses_in_parts_are_those_of_all_logits(recipe, monkeypatch):
    torch.manual_seed(0)
    model = build(get_recipe(recipe, []).model)
    tokens = torch.randint(0, 99, (2, 21), generator=DRAW)
    labels = tokens.roll(-1, 1)
    found = []
    for most in (1 << 28, 5 * model.config.vocab_size):
        monkeypatch.setattr(head, "MOST", most)
        model.zero_grad()
        losses = model(tokens, None, labels)
        losses[:, :-1].sum().backward()
        found.append((losses.detach(), [p.grad.clone() for p in model.parameters()]))
    expected = functional.cross_entropy(model(tokens).transpose(1, 2), labels, reduction="none")
    for losses, _ in found:
        assert (losses - expected).abs().max() < 1e-6 * expected.max()
    for one, other in zip(found[0][1], found[1][1], strict=True):
        assert (one - other).abs().max() <= 1e-5 * max(1, float(one.abs().max()))


@pytest.mark.integration
def test_compiled_layers_say_the_same():
    """By one graph for layers of a kind, without a break, and keep what they should."""
    tokens = torch.randint(0, 99, (2, 21), generator=DRAW)
    expected, losses, _ = trained(tokens, again=False, compiled=False)
    kept = {}
    for again in (False, "selective", True):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        found, its, kept[again] = trained(tokens, again, compiled=True)
        assert (losses - its).abs().max() < 1e-5
        for one, other in zip(expected, found, strict=True):
            assert (one - other).abs().max() <= 1e-4 * max(1, float(one.abs().max()))
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2
    assert kept[True] < kept["selective"] < kept[False], kept


def trained(tokens, again, compiled):
    """Gradients and losses of a small model, and how many bytes its layers kept for the backward pass."""
    torch.manual_seed(0)
    model = build(get_recipe("phi3-demo", ["model.hidden_size=64", "model.num_hidden_layers=3"]).model)
    recompute(model, again)
    kept = {}

    def keep(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    for part in model.modules():
        if compiled and isinstance(part, DecoderLayer):
            part.compile(fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        losses = model(tokens, None, tokens)
    losses.sum().backward()
    return [p.grad.clone() for p in model.parameters()], losses.detach(), sum(kept.values())


def test_losses_without_gradients_keep_nothing():
    with torch.no_grad():
        logits = drawn(200, 30)
        expected = functional.cross_entropy(logits, torch.zeros(200, dtype=torch.long), reduction="none")
        assert torch.allclose(token_losses(logits, torch.zeros(200, dtype=torch.long)), expected, atol=1e-5)
