"""Fewer passes over memory, the same values and gradients as PyTorch's own operations."""

import pytest
import torch
from torch.nn import functional

from phi_train.models.fused import causal_attention, rms_norm, rotate_pairs, swiglu, token_losses

DRAW = torch.Generator().manual_seed(0)


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


def test_losses_without_gradients_keep_nothing():
    with torch.no_grad():
        logits = drawn(200, 30)
        expected = functional.cross_entropy(logits, torch.zeros(200, dtype=torch.long), reduction="none")
        assert torch.allclose(token_losses(logits, torch.zeros(200, dtype=torch.long)), expected, atol=1e-5)
