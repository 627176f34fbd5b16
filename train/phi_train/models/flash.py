"""Flash attention on GPUs: flash-attn 4, 3 or 2 (arXiv:2205.14135, arXiv:2307.08691) where installed, else PyTorch's.

All are asked by their function for packed texts, of which a batch of whole texts is a case.
Shapes: B batch, H heads, G key-value heads, T tokens, D head_dim, N texts or documents.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

_PACKAGES = {  # by name: the module; the first one that is there is taken
    "flash-attn 4": "flash_attn.cute",
    "flash-attn 3": "flash_attn_interface",
    "flash-attn 2": "flash_attn",
}
_WIDEST = 256  # head_dim


@dataclass(frozen=True)
class Texts:
    """Where texts begin in a packed batch, in tokens. begins [N + 1]: int32, the last one's end too."""

    begins: Tensor
    longest: int


@cache
def kernel() -> tuple[str, Callable[..., Any]]:
    """The name of what is installed, and its function."""
    for name, module in _PACKAGES.items():
        try:
            found: Callable[..., Any] = import_module(module).flash_attn_varlen_func
        except (ImportError, AttributeError):
            continue
        return name, found
    from torch.nn.attention.varlen import varlen_attn

    return "PyTorch", varlen_attn


def usable(q_BHTD: Tensor, dropout: float) -> bool:
    """Whether there is a kernel for such heads: 16 bits on a GPU, and dropout in flash-attn 2 alone."""
    D = q_BHTD.shape[-1]
    fits = q_BHTD.is_cuda and q_BHTD.dtype in (torch.bfloat16, torch.float16) and D % 8 == 0 and D <= _WIDEST
    return fits and (not dropout or kernel()[0] == "flash-attn 2")


def texts_of(documents_BT: Tensor | None, batch: int, length: int, device: torch.device) -> Texts:
    """Each row's documents, runs of the same number, or each row whole."""
    if documents_BT is None:
        return Texts(torch.arange(0, batch * length + 1, length, dtype=torch.int32, device=device), length)
    begins = torch.ones_like(documents_BT, dtype=torch.bool)
    begins[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    at = begins.flatten().nonzero()[:, 0]
    at = torch.cat([at, at.new_tensor([batch * length])]).to(torch.int32)
    return Texts(at, int((at[1:] - at[:-1]).max()))


def flash_attention(
    q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, texts: Texts, scale: float, window: int | None, dropout: float
) -> Tensor:
    """Causal attention within each text, [B, T, H * D]. window: keys that a token sees, itself among them."""
    B, H, T, D = q_BHTD.shape
    q, k, v = (x.transpose(1, 2).reshape(B * T, x.shape[1], D) for x in (q_BHTD, k_BGTD, v_BGTD))
    left = -1 if window is None else window - 1
    name, run = kernel()
    if name == "PyTorch":
        out = run(
            q, k, v, texts.begins, texts.begins, texts.longest, texts.longest,
            scale=scale, window_size=(left, 0), enable_gqa=k.shape[1] < H,
        )  # fmt: skip
    else:
        settings: dict[str, object] = {"cu_seqlens_q": texts.begins, "cu_seqlens_k": texts.begins}
        settings |= {"max_seqlen_q": texts.longest, "max_seqlen_k": texts.longest}
        settings |= {"softmax_scale": scale, "causal": True}
        if window is not None:
            settings["window_size"] = (left, 0)
        if dropout:
            settings["dropout_p"] = dropout
        out = run(q, k, v, **settings)
    found: Tensor = out[0] if isinstance(out, tuple) else out  # some give the softmax's normaliser too
    return found.reshape(B, T, H * D)
