"""What the architectures share: rotary embedding, attention masks, and attention itself.

Shapes: B batch, T tokens, H heads, G key-value heads, D head_dim.
"""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from phi_runtime.architecture.decoder import Decoder, Layer, visible
from phi_train.models import flash
from phi_train.models.fused import causal_attention, product_dtype, rotate_pairs

FakeQuant = Callable[[Tensor], Tensor]


def no_fake_quant(weight: Tensor) -> Tensor:
    """The weight as it is; `qat.enable_qat` puts another in its place."""
    return weight


class AttentionContext:
    """Per-forward RoPE tables and attention masks.

    documents [B, T]: of which document each token is, where a text is to see no other; None where packed texts see
    what stands before them, as the papers have it.
    """

    def __init__(
        self,
        decoder: Decoder,
        length: int,
        device: torch.device,
        documents: Tensor | None = None,
        dropout: float = 0.0,
    ) -> None:
        self.decoder, self._length, self._device, self.dropout = decoder, length, device, dropout
        self._documents = documents
        self._texts: flash.Texts | None = None
        self._masks: dict[object, Tensor | None] = {}
        if decoder.rope is not None:
            self.cos_TD, self.sin_TD = _tables(decoder, length, device)

    def mask(self, layer: Layer) -> Tensor | None:
        """Which keys are seen, bool, to be broadcast to [B, H, T, T]; None where plain causality says it all."""
        key = (layer.window if self.cuts(layer) else None, layer.sparse)
        if key not in self._masks:
            self._masks[key] = self._mask(layer)
        return self._masks[key]

    def drop(self, x: Tensor) -> Tensor:
        """What is added to the residual stream, with dropout."""
        return functional.dropout(x, self.dropout) if self.dropout else x

    def cuts(self, layer: Layer) -> bool:
        """Whether the layer's window leaves anything out of a text of this length."""
        return layer.window is not None and layer.window < self._length

    def texts(self, batch: int) -> flash.Texts:
        """Where the texts begin that are kept from each other."""
        if self._texts is None:
            self._texts = flash.texts_of(self._documents, batch, self._length, self._device)
        return self._texts

    def by_flash(self, x: Tensor, layer: Layer) -> bool:
        """Whether a layer's attention is by a kernel of flash attention, where its values are as x."""
        return layer.sparse is None and flash.usable(x, self.dropout)

    def prepare(self, x_BTE: Tensor, layer: Layer) -> None:
        """Find what a layer asks for before it does: what is computed again by torch.compile may not keep anything."""
        values = torch.empty(0, self.decoder.head_dim, dtype=product_dtype(x_BTE), device=x_BTE.device)
        if self.by_flash(values, layer):
            self.texts(len(x_BTE))
        else:
            self.mask(layer)

    def _mask(self, layer: Layer) -> Tensor | None:
        documents = self._documents
        if documents is None and layer.sparse is None and not self.cuts(layer):
            return None
        at = np.arange(self._length)
        heads = self.decoder.heads if layer.sparse is not None else 1
        seen = np.stack([visible(layer, head, at, at) for head in range(heads)])[None]
        mask = torch.from_numpy(seen).to(self._device)
        return mask if documents is None else mask & (documents[:, None, :, None] == documents[:, None, None, :])


@lru_cache(maxsize=8)
def _tables(decoder: Decoder, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
    assert decoder.rope is not None
    cos, sin = decoder.rope.tables(np.arange(length), length)
    with torch.inference_mode(False):  # a training may come to them after an evaluation that made them
        return torch.from_numpy(cos).to(device), torch.from_numpy(sin).to(device)


def rotate(x_BHTD: Tensor, context: AttentionContext) -> Tensor:
    """Rotate each head's first values by their positions; the rest stays."""
    return rotate_pairs(x_BHTD, context.cos_TD, context.sin_TD)


def attend(q_BHTD: Tensor, k_BGTD: Tensor, v_BGTD: Tensor, layer: Layer, context: AttentionContext) -> Tensor:
    """Attention, [B, T, H * D]. float16 overflows in phi-2's scores, so that is computed in float32 here."""
    scale, dtype = context.decoder.attention_scale, v_BGTD.dtype
    if context.by_flash(v_BGTD, layer):
        window = layer.window if context.cuts(layer) else None
        q, k, texts = q_BHTD.to(dtype), k_BGTD.to(dtype), context.texts(len(q_BHTD))
        return flash.flash_attention(q, k, v_BGTD, texts, scale, window, context.dropout)
    if dtype == torch.float16:
        q_BHTD, k_BGTD, v_BGTD = q_BHTD.float(), k_BGTD.float(), v_BGTD.float()
    else:
        q_BHTD, k_BGTD = q_BHTD.to(dtype), k_BGTD.to(dtype)
    mask = context.mask(layer)
    if mask is None and _short(q_BHTD, context):
        G = q_BHTD.shape[1] // k_BGTD.shape[1]
        each = causal_attention(q_BHTD, k_BGTD.repeat_interleave(G, 1), v_BGTD.repeat_interleave(G, 1), scale)
        return each.transpose(1, 2).flatten(2)
    out = functional.scaled_dot_product_attention(
        q_BHTD,
        k_BGTD,
        v_BGTD,
        attn_mask=mask,
        dropout_p=context.dropout,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=k_BGTD.shape[1] < q_BHTD.shape[1],
    )
    return out.to(dtype).transpose(1, 2).flatten(2)


def _short(x_BHTD: Tensor, context: AttentionContext) -> bool:
    """Whether weights of attention are few enough to be kept, on a processor, where that is twice as fast."""
    few = x_BHTD.numel() // x_BHTD.shape[-1] * x_BHTD.shape[2] * x_BHTD.element_size() <= _KEPT
    return few and x_BHTD.device.type == "cpu" and x_BHTD.dtype == torch.bfloat16 and not context.dropout


_KEPT = 1 << 26  # bytes


def gelu_new(x: Tensor) -> Tensor:
    """GELU by its tanh approximation, as GPT-2 and the first Phis have it."""
    return functional.gelu(x, approximate="tanh")


def split_heads(x_BTE: Tensor, heads: int) -> Tensor:
    """[B, T, H * D] to [B, H, T, D]."""
    B, T, E = x_BTE.shape
    return x_BTE.view(B, T, heads, E // heads).transpose(1, 2)


def check_length(tokens_BT: Tensor, context: int) -> int:
    """The number of tokens. Raises ValueError for more than the context."""
    length = tokens_BT.shape[1]
    if length > context:
        raise ValueError(f"{length} tokens are more than the context of {context}")
    return length
