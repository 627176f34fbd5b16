"""Forward passes in PyTorch, a layer at a time: many windows at once, with gradients.

Products may be in bfloat16, which some processors multiply faster; everything else is in float32. What a Phi is
stands in its `Decoder`; the NumPy reference (`phi_runtime.backends.reference`) is what this is held to.

Shapes: B windows, T tokens of each, H heads, G key-value heads, D head_dim, E hidden_size, V vocab_size.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from phi_runtime.architecture.decoder import Decoder, Layer, Linear, Norm, visible
from phi_runtime.backends.reference import ReadTensor

# Told a matrix and what enters it, [B, T, columns], in the type of the products.
Watch = Callable[[Linear, Tensor], None]

# Told keys before they are rotated, and values, [B, G, T, D].
WatchCache = Callable[[Tensor, Tensor], None]

# The weights of the matrices at hand, by tensor name.
Weights = dict[str, Tensor]


class TorchDecoder:
    """Runs layers on windows of one length, each from an empty context; `dtype` is that of the products."""

    def __init__(
        self,
        decoder: Decoder,
        read: ReadTensor,
        length: int,
        dtype: torch.dtype = torch.float32,
        watch: Watch = lambda *_: None,
        watch_cache: WatchCache = lambda *_: None,
    ) -> None:
        self.decoder, self.dtype = decoder, dtype
        self._read, self._length = read, length
        self._watch, self._watch_cache = watch, watch_cache
        self._tables: tuple[Tensor, Tensor] | None = None
        if self.decoder.rope is not None:
            cos, sin = self.decoder.rope.tables(np.arange(length), length)
            self._tables = torch.from_numpy(cos), torch.from_numpy(sin)

    def weights(self, *linears: Linear) -> Weights:
        """The weights of some matrices, whole, in the type of the products."""
        names = {name for linear in linears for name in linear.weight}
        return {name: torch.from_numpy(self._read(name)).to(self.dtype) for name in sorted(names)}

    def embed(self, windows: list[list[int]]) -> Tensor:
        """What enters the first layer, [B, T, E]."""
        d = self.decoder
        tokens, where = np.unique(np.asarray(windows), return_inverse=True)
        rows = np.concatenate([self._read(d.embedding, int(t), int(t) + 1) for t in tokens])
        x_BTE = rows[where.reshape(len(windows), -1)] * np.float32(d.embedding_scale)
        if d.positions is not None:
            x_BTE = x_BTE + self._read(d.positions, 0, self._length)
        return torch.from_numpy(x_BTE)

    def layer(self, n: int, x_BTE: Tensor, weights: Weights) -> Tensor:
        """What leaves a layer, [B, T, E]."""
        layer = self.decoder.layers[n]
        normed = self.norm(x_BTE, layer.attention_norm)
        attended = self._attend(layer, self.linear(normed, layer.qkv, weights))
        added = self.linear(attended, layer.o, weights)
        if layer.mlp_norm is None:
            return x_BTE + added + self._mlp(normed, layer, weights)
        x_BTE = x_BTE + added
        return x_BTE + self._mlp(self.norm(x_BTE, layer.mlp_norm), layer, weights)

    def logits(self, x_BTE: Tensor, weights: Weights) -> Tensor:
        """What the head makes of the activations after the last layer, [B, T, V]."""
        y_BTV = self.linear(self.norm(x_BTE, self.decoder.final_norm), self.decoder.head, weights)
        return y_BTV * self.decoder.logit_scale

    def linear(self, x: Tensor, linear: Linear, weights: Weights) -> Tensor:
        """Activations times a matrix, in float32."""
        y = self._product(x, linear, weights).float()
        return y + torch.cat([self._vector(name) for name in linear.bias]) if linear.bias else y

    def _product(self, x: Tensor, linear: Linear, weights: Weights) -> Tensor:
        """The same without its bias, in the type of the products."""
        x = x.to(self.dtype)
        self._watch(linear, x)
        parts = [weights[name] for name in linear.weight]
        return F.linear(x, parts[0] if len(parts) == 1 else torch.cat(parts))

    def norm(self, x: Tensor, norm: Norm) -> Tensor:
        """Activations, normalised."""
        eps, weight = self.decoder.norm_eps, self._vector(norm.weight)
        if norm.bias is None:
            return F.rms_norm(x, (x.shape[-1],), weight, eps)
        return F.layer_norm(x, (x.shape[-1],), weight, self._vector(norm.bias), eps)

    def _vector(self, name: str) -> Tensor:
        return torch.from_numpy(self._read(name))

    def _mlp(self, x: Tensor, layer: Layer, weights: Weights) -> Tensor:
        d = self.decoder
        hidden = (self.linear if layer.up.bias else self._product)(x, layer.up, weights)
        if d.activation == "gegelu":
            gate = hidden[..., ::2].clamp(max=d.gegelu_limit)
            up = hidden[..., 1::2].clamp(-d.gegelu_limit, d.gegelu_limit)
            inner = gate * torch.sigmoid(1.702 * gate) * (up + 1)
        elif d.gated:
            gate, up = hidden.chunk(2, dim=-1)
            inner = F.silu(gate) * up
        else:
            inner = F.gelu(hidden, approximate="tanh")
        return self.linear(inner, layer.down, weights)

    def _attend(self, layer: Layer, qkv: Tensor) -> Tensor:
        d = self.decoder
        q, k, v = self._split_heads(qkv)
        self._watch_cache(k, v)
        q, k = self._rotate(q), self._rotate(k)
        k, v = (x.repeat_interleave(d.heads // d.kv_heads, dim=1) for x in (k, v))
        seen = self._visible(layer)
        out = F.scaled_dot_product_attention(q, k, v, seen, is_causal=seen is None, scale=d.attention_scale)
        return out.transpose(1, 2).reshape(*qkv.shape[:2], d.q_size)

    def _visible(self, layer: Layer) -> Tensor | None:
        """Which keys each query may see, [1, heads or 1, T, T]; None for all that stand before it."""
        if layer.sparse is None and (layer.window or self._length) >= self._length:
            return None
        heads = range(self.decoder.heads) if layer.sparse is not None else range(1)
        positions = np.arange(self._length)
        return torch.from_numpy(np.stack([visible(layer, h, positions, positions) for h in heads])[None])

    def _split_heads(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [B, H, T, D], keys and values [B, G, T, D] of the fused projection."""
        d, (b, t) = self.decoder, qkv.shape[:2]
        if not d.qkv_by_group:
            q, k, v = torch.split(qkv, [d.q_size, d.kv_size, d.kv_size], dim=-1)
        else:
            groups = qkv.reshape(b, t, d.kv_heads, -1, d.head_dim)
            q, k, v = groups[..., :-2, :], groups[..., -2, :], groups[..., -1, :]
        return (
            q.reshape(b, t, d.heads, d.head_dim).transpose(1, 2),
            k.reshape(b, t, d.kv_heads, d.head_dim).transpose(1, 2),
            v.reshape(b, t, d.kv_heads, d.head_dim).transpose(1, 2),
        )

    def _rotate(self, x: Tensor) -> Tensor:
        """Rotate the pairs (d, d + dims/2) of each head's first `dims` values."""
        if self._tables is None:
            return x
        cos, sin = self._tables
        half = cos.shape[-1]
        a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin, rest], dim=-1)
