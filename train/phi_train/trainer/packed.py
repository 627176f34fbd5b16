"""A frozen base in four bits, beside which an adapter learns (QLoRA, arXiv:2305.14314): on the exporter's uniform grid,
half a byte for each weight and a float16 scale for each block of a row.

Shapes: O rows and I columns of a matrix.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from phi_train.grid import block_of, parse_grid
from phi_train.models.fused import product_dtype
from phi_train.trainer.qat import quantise

_ZERO = 8  # what is added to a code, so that it is not negative


@torch.no_grad()
def pack(module: nn.Linear, grid: str) -> bool:
    """Put four bits in the place of a layer's weights; whether its rows divide into the grid's blocks."""
    bits, widest = parse_grid(grid)
    rows, columns = module.weight.shape
    block = block_of(columns, widest)
    if block is None:
        return False
    codes, scales = quantise(module.weight, bits, block)
    halves = (codes.view(rows, columns // 2, 2) + _ZERO).to(torch.uint8)
    module.register_buffer("codes", halves[..., 0] | halves[..., 1] << 4)
    # Its bits: an engine that turns a model's floats to bfloat16 is to leave them as they are.
    module.register_buffer("scales", scales.half().view(torch.int16).view(rows, columns // block))
    module.register_parameter("weight", None)
    return True


def packed_linear(module: nn.Linear, x: Tensor) -> Tensor:
    """The layer of what `pack` left; nothing unpacked is kept for the backward pass."""
    out: Tensor = _Product.apply(x.to(product_dtype(x)), module.codes, module.scales)  # type: ignore[no-untyped-call]
    return out if module.bias is None else out + module.bias


def unpacked_weights(model: nn.Module) -> dict[str, Tensor]:
    """The float32 values [O, I] of all packed matrices, by their parameters' names."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "codes") and hasattr(module, "scales"):
            found[f"{name}.weight"] = _unpacked(module.codes, module.scales, torch.float32).cpu()
    return found


def _unpacked(codes: Any, scales: Any, dtype: torch.dtype) -> Tensor:
    both = torch.stack((codes & 15, codes >> 4), -1).to(torch.float32) - _ZERO
    weights: Tensor = both.view(*scales.shape, -1) * scales.view(torch.float16).float()[..., None]
    return weights.view(len(codes), -1).to(dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scales: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scales)
        return functional.linear(x, _unpacked(codes, scales, x.dtype))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        codes, scales = ctx.saved_tensors
        return gradient @ _unpacked(codes, scales, gradient.dtype), None, None
