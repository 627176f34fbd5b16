"""Operations with fewer passes over memory, which is the bottleneck of training on processors.

A GPU, where a pass over few rows is mostly its start, takes plain operations instead; so does torch.compile, which
fuses them.

Shapes: B batch, H heads, T tokens, D head_dim, E hidden_size, V vocabulary, N rows of any of them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

_ROWS, _VALUES = 128, 1 << 17  # at a time on a processor, so that they stay in the cache: at least, and about
_GPU_ROWS = 4096  # of logits at a time, so that they are never held in float32 as a whole


def _on_processor(x: Tensor) -> bool:
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def product_dtype(x: Tensor) -> torch.dtype:
    """What a product of x is computed in: autocast's type where that is on."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def _parts(rows: int, width: int) -> list[slice]:
    """Of rows of `width` values, on a processor."""
    return _slices(rows, max(_ROWS, _VALUES // width))


def _slices(rows: int, size: int) -> list[slice]:
    return [slice(i, i + size) for i in range(0, rows, size)]


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_TD, sin_TD)
        return _rotated(x_BHTD, cos_TD, sin_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        cos_TD, sin_TD = ctx.saved_tensors
        return _rotated(gradient, cos_TD, -sin_TD), None, None


def rotate_pairs(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """Rotate the pairs (d, d + half) of each head's first dimensions; in float32, given back in the input's type."""
    if not _on_processor(x_BHTD):
        return plain_rotate(x_BHTD, cos_TD, sin_TD)
    out: Tensor = _Rotate.apply(x_BHTD, cos_TD, sin_TD)  # type: ignore[no-untyped-call]
    return out


def plain_rotate(x_BHTD: Tensor, cos_TD: Tensor, sin_TD: Tensor) -> Tensor:
    """The same in plain operations."""
    half = cos_TD.shape[-1]
    a, b = x_BHTD[..., :half].float(), x_BHTD[..., half : 2 * half].float()
    turned = (a * cos_TD - b * sin_TD, b * cos_TD + a * sin_TD)
    return torch.cat([*(t.to(x_BHTD.dtype) for t in turned), x_BHTD[..., 2 * half :]], -1)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = cos.shape[-1]
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for at in _slices(len(x), max(1, _VALUES // x[0].numel())):
        texts = x[at]
        a, b = texts[..., :half].float(), texts[..., half : 2 * half].float()
        out[at, ..., :half] = (a * cos).addcmul_(b, sin, value=-1)
        out[at, ..., half : 2 * half] = (b * cos).addcmul_(a, sin)
        out[at, ..., 2 * half :] = texts[..., 2 * half :]
    return out


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_E: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        rows_NE = x.reshape(-1, x.shape[-1])
        out = torch.empty(rows_NE.shape, dtype=dtype, device=x.device)
        scales_N = torch.empty(len(rows_NE), dtype=torch.float32, device=x.device)
        for at in _parts(*rows_NE.shape):
            part = rows_NE[at].float()
            scale = torch.rsqrt(part.square().mean(1, keepdim=True) + eps)
            out[at] = (part * scale).mul_(weight_E)
            scales_N[at] = scale[:, 0]
        ctx.save_for_backward(rows_NE, weight_E, scales_N)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows_NE, weight_E, scales_N = ctx.saved_tensors
        flat = gradient.reshape(rows_NE.shape)
        out, of_weight = torch.empty_like(rows_NE), torch.zeros_like(weight_E, dtype=torch.float32)
        for at in _parts(*rows_NE.shape):
            x, g, scale = rows_NE[at].float(), flat[at].float(), scales_N[at, None]
            x = x * scale
            of_weight += (g * x).sum(0)
            g = g * weight_E
            out[at] = g.addcmul_(x, (g * x).mean(1, keepdim=True), value=-1).mul_(scale)
        return out.view(gradient.shape), of_weight.to(weight_E.dtype), None, None


def rms_norm(x_BTE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """The root-mean-square norm of the last axis, computed in float32; in the products' type where autocast is on."""
    dtype = product_dtype(x_BTE)
    if not _on_processor(x_BTE):
        return plain_rms_norm(x_BTE, weight_E, eps).to(dtype)
    out: Tensor = _RmsNorm.apply(x_BTE, weight_E, eps, dtype)  # type: ignore[no-untyped-call]
    return out


def plain_rms_norm(x_BTE: Tensor, weight_E: Tensor, eps: float) -> Tensor:
    """The same in plain operations, in float32."""
    return functional.rms_norm(x_BTE.float(), weight_E.shape, weight_E.float(), eps)


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, both: Tensor) -> Tensor:
        rows = both.reshape(-1, both.shape[-1])
        half = rows.shape[1] // 2
        out = torch.empty((len(rows), half), dtype=both.dtype, device=both.device)
        for at in _parts(*rows.shape):
            gate, up = rows[at, :half].float(), rows[at, half:]
            out[at] = functional.silu(gate).mul_(up)
        ctx.save_for_backward(rows)
        return out.view(*both.shape[:-1], half)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (rows,) = ctx.saved_tensors
        half = rows.shape[1] // 2
        flat = gradient.reshape(-1, half)
        out = torch.empty_like(rows)
        for at in _parts(*rows.shape):
            gate, up = rows[at, :half].float(), rows[at, half:].float()
            g = flat[at].float()
            out[at, half:] = functional.silu(gate).mul_(g)
            out[at, :half] = torch.ops.aten.silu_backward(g * up, gate)
        return out.view(*gradient.shape[:-1], 2 * half)


def swiglu(both: Tensor) -> Tensor:
    """silu(gate) * up of [..., gate then up]."""
    if not _on_processor(both):
        return plain_swiglu(both)
    out: Tensor = _SwiGlu.apply(both)  # type: ignore[no-untyped-call]
    return out


def plain_swiglu(both: Tensor) -> Tensor:
    """The same in plain operations."""
    gate, up = both.chunk(2, -1)
    return functional.silu(gate) * up


class _CausalAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        seen = torch.full((q.shape[1], q.shape[1]), float("-inf"), dtype=q.dtype, device=q.device).triu_(1)
        p = torch.bmm(q * scale, k.transpose(1, 2)).add_(seen)
        torch.softmax(p, -1, out=p)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale = scale
        return torch.bmm(p, v)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, p = ctx.saved_tensors
        gradient = gradient.contiguous()
        dv = torch.bmm(p.transpose(1, 2), gradient)
        ds = torch._softmax_backward_data(torch.bmm(gradient, v.transpose(1, 2)), p, -1, p.dtype)
        dq = torch.bmm(ds, k).mul_(ctx.scale)
        dk = torch.bmm(ds.transpose(1, 2), q).mul_(ctx.scale)
        return dq, dk, dv, None


def causal_attention(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, scale: float) -> Tensor:
    """Attention of each token over those up to it, its weights kept for the backward pass."""
    flat = [x.reshape(-1, *x.shape[2:]) for x in (q_BHTD, k_BHTD, v_BHTD)]
    out: Tensor = _CausalAttention.apply(*flat, scale)  # type: ignore[no-untyped-call]
    return out.view_as(q_BHTD)


class _TokenLosses(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, wanted_N: Tensor) -> Tensor:
        losses = torch.empty(len(logits_NV), dtype=torch.float32, device=logits_NV.device)
        keep = ctx.needs_input_grad[0]
        gradients = torch.empty_like(logits_NV) if keep else None
        for at in _parts(*logits_NV.shape) if _on_processor(logits_NV) else _slices(len(logits_NV), _GPU_ROWS):
            part = logits_NV[at].to(torch.float32, copy=True)
            chosen = wanted_N[at, None]
            part -= part.amax(1, keepdim=True)
            least = part.gather(1, chosen)
            part.exp_()
            total = part.sum(1, keepdim=True)
            losses[at] = (total.log() - least)[:, 0]
            if gradients is not None:
                part /= total
                part.scatter_add_(1, chosen, torch.full_like(least, -1))
                gradients[at] = part
        ctx.save_for_backward(gradients)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_N: Tensor) -> tuple[Tensor, None]:
        (gradients,) = ctx.saved_tensors
        return gradients.mul_(gradient_N[:, None].to(gradients.dtype)), None


def token_losses(logits_NV: Tensor, wanted_N: Tensor) -> Tensor:
    """Negative log-likelihoods [N], nats, in float32; logits are never held in float32 as a whole."""
    out: Tensor = _TokenLosses.apply(logits_NV, wanted_N)  # type: ignore[no-untyped-call]
    return out
