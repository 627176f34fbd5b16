"""Training for the grid that a model will be exported to: it computes with rounded weights, and learns as if it did
not (the straight-through estimator, arXiv:1308.3432).
"""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional

from phi_train.grid import SHRINK, block_of, parse_grid
from phi_train.models import CausalLM

_TOKENS = ("embed_tokens", "wte")  # learnt positions stay as they are


def round_weight(weight: Tensor, bits: int, block: int) -> Tensor:
    """A matrix [rows, columns] with its values on the grid; see `quantise`."""
    codes, scales = quantise(weight, bits, block)
    return (codes * scales[:, None]).view(weight.shape)


@torch.no_grad()
def quantise(weight: Tensor, bits: int, block: int) -> tuple[Tensor, Tensor]:
    """Codes [blocks, block] and scales [blocks] of a matrix on the exporter's uniform grid, without error feedback: the
    same as `phi_export.quantize.uniform.round_rows` gives. Scales are float16's values, in float32.
    """
    blocks = weight.float().view(-1, block)
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    upper, lower = blocks.amax(1), blocks.amin(1)
    reach = torch.where(upper > -lower, upper, lower)
    best, scale = torch.zeros_like(reach), torch.zeros_like(reach)
    for shrink in SHRINK[bits]:
        codes = _codes(blocks, reach * (shrink / low), low, high)
        dot, norm = (blocks * codes).sum(1), (codes * codes).sum(1)
        fitted = torch.where(norm > 0, dot / norm, 0)
        gain = dot * fitted
        scale = torch.where(gain > best, fitted, scale)
        best = torch.maximum(best, gain)
    stored = scale.half().float()
    return _codes(blocks, stored, low, high), stored


def _codes(blocks: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    inverse = torch.where(scale.abs() > 1e-30, 1 / scale, 0)
    return (blocks * inverse[:, None]).round_().clamp_(low, high)


def enable_qat(model: CausalLM, grid: str) -> None:
    """Let all matrices of a model be rounded to a grid whenever it computes; their own values are what is learnt.

    Raises UsageError for a grid that there is not.
    """
    bits, widest = parse_grid(grid)
    rounded = partial(_straight_through, bits=bits, widest=widest)
    model.fake_quant = rounded
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":  # the head asks `fake_quant` itself
            module.forward = partial(_linear, module, rounded)  # type: ignore[method-assign]
        elif isinstance(module, nn.Embedding) and name.endswith(_TOKENS):
            module.forward = partial(_embedding, module, rounded)  # type: ignore[method-assign]


def _straight_through(weight: Tensor, bits: int, widest: int) -> Tensor:
    block = block_of(weight.shape[1], widest)
    if block is None:
        return weight
    return weight + (round_weight(weight, bits, block) - weight).detach()


def _linear(module: nn.Linear, rounded: partial[Tensor], x: Tensor) -> Tensor:
    return functional.linear(x, rounded(module.weight), module.bias)


def _embedding(module: nn.Embedding, rounded: partial[Tensor], tokens: Tensor) -> Tensor:
    return functional.embedding(tokens, rounded(module.weight))
