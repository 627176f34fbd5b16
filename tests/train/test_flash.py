"""Flash attention's place: texts kept apart, windows and shapes, by a stand-in for the kernel that GPUs have."""

import inspect
import sys
from types import ModuleType

import pytest
import torch
from torch.nn.attention.varlen import varlen_attn

from phi_train.models import build, flash
from phi_train.recipes.catalogue import get_recipe

DRAW = torch.Generator().manual_seed(0)


def one_by_one(q, k, v, begins, longest, scale, window):
    """Attention of each text by itself; [tokens, heads, head_dim]."""
    out = torch.empty_like(q)
    k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    lengths = (begins[1:] - begins[:-1]).tolist()
    assert begins.dtype == torch.int32 and max(lengths) == longest and begins[-1] == len(q)
    for begin, length in zip(begins.tolist(), lengths, strict=False):
        part = slice(begin, begin + length)
        scores = torch.einsum("qhd,khd->hqk", q[part], k[part]) * scale
        behind = torch.arange(length)[:, None] - torch.arange(length)[None]
        seen = (behind >= 0) & (behind <= window if window >= 0 else True)
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out[part] = torch.einsum("hqk,khd->qhd", weights, v[part])
    return out


def pytorch(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa):
    assert cu_seq_q is cu_seq_k and max_q == max_k and window_size[1] == 0
    assert enable_gqa == (key.shape[1] < query.shape[1])
    return one_by_one(query, key, value, cu_seq_q, max_q, scale, window_size[0])


def package(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, **rest):
    assert causal and cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k
    left, right = rest.pop("window_size", (-1, 0))
    assert right == 0 and not rest
    return one_by_one(q, k, v, cu_seqlens_q, max_seqlen_q, softmax_scale, left), "normaliser"


@pytest.mark.parametrize("kernel", [("PyTorch", pytorch), ("flash-attn 4", package)])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("recipe", ["phi1-demo", "phi3-demo", "tinystories-1m-demo"])
def test_a_model_says_the_same_by_it(recipe, apart, kernel, monkeypatch):
    torch.manual_seed(0)
    changes = ["model.num_attention_heads=4", "model.num_key_value_heads=2", "model.sliding_window=7"]
    model = build(get_recipe(recipe, changes if recipe == "phi3-demo" else []).model)
    tokens = torch.randint(0, 99, (3, 24), generator=DRAW)
    documents = torch.tensor([[0] * 24, [0] * 5 + [1] * 19, [3] * 10 + [4] + [5] * 13]) if apart else None
    expected = model(tokens, documents)
    used = []

    def counted(*args, **kwargs):
        used.append(1)
        return kernel[1](*args, **kwargs)

    monkeypatch.setattr(flash, "usable", lambda q, dropout: True)
    monkeypatch.setattr(flash, "kernel", lambda: (kernel[0], counted))
    assert (model(tokens, documents) - expected).abs().max() < 2e-6 * expected.abs().max()
    assert len(used) == len(model.decoder.layers)


def test_pytorch_takes_what_we_give():
    """The stand-in has the names of the real function."""
    real, ours = (inspect.signature(f).parameters for f in (varlen_attn, pytorch))
    assert list(real)[:7] == list(ours)[:7] and set(ours) <= set(real)


def test_which_is_taken(monkeypatch):
    flash.kernel.cache_clear()
    assert flash.kernel()[0] == "PyTorch"
    for name, module in (("flash-attn 2", "flash_attn"), ("flash-attn 3", "flash_attn_interface")):
        there = ModuleType(module)
        there.flash_attn_varlen_func = package
        monkeypatch.setitem(sys.modules, module, there)
        flash.kernel.cache_clear()
        assert flash.kernel() == (name, package)
    monkeypatch.undo()
    flash.kernel.cache_clear()
    half = torch.empty(1, 2, 8, 16, dtype=torch.bfloat16)
    assert not flash.usable(half, 0.0)  # a processor has none
