"""The reference: every Phi in plain NumPy, float32 throughout, slow and clear.

The fast engines and every exported bundle are held to it. It asks for some rows of a tensor at a
time, so it never holds the model.

Shapes: T new tokens, S tokens in the cache with them, H heads, G key-value heads, D head_dim, E hidden_size.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np

from phi_runtime.architecture.decoder import F32, Decoder, Layer, Linear, Norm, visible

# What an engine does to the activations [T, width] before it multiplies them with a matrix.
Rounding = Callable[[F32], F32]
_CHUNK = 1 << 23  # weights multiplied at a time; bounds the memory


class ReadTensor(Protocol):
    """Where the weights come from."""

    def __call__(self, name: str, start: int = 0, stop: int | None = None) -> F32:
        """Rows start..stop of a tensor of the checkpoint, by its name, as float32."""


class BatchSequence:
    """One computation among those that share a pass over the weights: its arithmetic, its cache, its activations."""

    def __init__(self, decoder: Decoder, capacity: int, rounding: Rounding) -> None:
        shape = (len(decoder.layers), decoder.kv_heads, capacity, decoder.head_dim)
        self.round = rounding
        self._keys_LGSD = np.zeros(shape, np.float32)
        self._values_LGSD = np.zeros(shape, np.float32)
        self.x_TE: F32 = np.zeros((0, 0), np.float32)

    def remember(self, layer: int, start: int, k_GTD: F32, v_GTD: F32) -> tuple[F32, F32]:
        """All keys and values [G, S, D] of a layer, these new ones included."""
        if not self._keys_LGSD.shape[2]:
            return k_GTD, v_GTD
        stop = start + k_GTD.shape[1]
        self._keys_LGSD[layer, :, start:stop], self._values_LGSD[layer, :, start:stop] = k_GTD, v_GTD
        return self._keys_LGSD[layer, :, :stop], self._values_LGSD[layer, :, :stop]


class Reference:
    """Runs a decoder over whatever `read` gives, on several sequences at once.

    `context` is what the caches hold; with 0 there are none, and `forward` is for one call, a whole text.
    A sequence's `rounding` imitates an engine's arithmetic, to learn how far that alone moves the logits.
    `watch` is told each layer's number and the sequences after it.
    """

    def __init__(
        self,
        decoder: Decoder,
        read: ReadTensor,
        context: int | None = None,
        roundings: tuple[Rounding, ...] = (lambda x: x,),
        watch: Callable[[int, list[BatchSequence]], None] = lambda *_: None,
    ) -> None:
        self.decoder = decoder
        self.context = decoder.context if context is None else context
        self.position = 0
        self._read, self._watch = read, watch
        self.sequences = [BatchSequence(decoder, self.context, r) for r in roundings]

    def forward(self, tokens: list[int] | list[list[int]], all_logits: bool) -> list[F32]:
        """Append tokens; per sequence the logits [T, vocab_size], or [1, vocab_size] of the last.

        `tokens` are one text for all sequences, or one for each, of equal length.
        """
        self.embed(tokens)
        for n in range(len(self.decoder.layers)):
            self.layer(n)
            self._watch(n, self.sequences)
        self.position += len(self.sequences[0].x_TE)
        return self.logits([sequence.x_TE if all_logits else sequence.x_TE[-1:] for sequence in self.sequences])

    def embed(self, tokens: list[int] | list[list[int]]) -> None:
        """Set each sequence's activations to what enters the first layer."""
        d = self.decoder
        found: dict[tuple[int, ...], F32] = {}
        for n, sequence in enumerate(self.sequences):
            given: Any = tokens[n] if isinstance(tokens[n], list) else tokens
            text: tuple[int, ...] = tuple(given)
            if text not in found:
                x_TE = self._rows(d.embedding, np.asarray(text)) * np.float32(d.embedding_scale)
                if d.positions is not None:
                    x_TE = x_TE + self._rows(d.positions, self.position + np.arange(len(text)))
                found[text] = x_TE
            sequence.x_TE = found[text]

    def layer(self, n: int) -> None:
        """Take every sequence through one layer."""
        sequences, layer = self.sequences, self.decoder.layers[n]
        positions = np.arange(self.position, self.position + len(sequences[0].x_TE))
        normed = self.norm([sequence.x_TE for sequence in sequences], layer.attention_norm)
        qkv = self.linear(normed, layer.qkv)
        attended = [self._attend(n, layer, sequence, x, positions) for sequence, x in zip(sequences, qkv, strict=True)]
        added = self.linear(attended, layer.o)
        if layer.mlp_norm is not None:
            _add(sequences, added)
            normed = self.norm([sequence.x_TE for sequence in sequences], layer.mlp_norm)
            added = self._mlp(normed, layer)
        else:
            added = [a + m for a, m in zip(added, self._mlp(normed, layer), strict=True)]
        _add(sequences, added)

    def logits(self, xs: list[F32]) -> list[F32]:
        """What the head makes of each sequence's activations after the last layer."""
        d = self.decoder
        return [y * np.float32(d.logit_scale) for y in self.linear(self.norm(xs, d.final_norm), d.head)]

    def trim(self, position: int) -> None:
        """Forget all tokens from `position` on."""
        self.position = position

    def close(self) -> None:
        """Drop the caches."""
        self.sequences = []

    def _rows(self, name: str, rows: np.ndarray) -> F32:
        wanted, inverse = np.unique(rows, return_inverse=True)
        return np.concatenate([self._read(name, int(r), int(r) + 1) for r in wanted])[inverse]

    def norm(self, xs: list[F32], norm: Norm) -> list[F32]:
        """Each sequence's activations, normalised."""
        weight, eps = self._read(norm.weight), self.decoder.norm_eps
        if norm.bias is None:
            return [rms_norm(x, weight, eps) for x in xs]
        bias = self._read(norm.bias)
        return [layer_norm(x, weight, bias, eps) for x in xs]

    def linear(self, xs: list[F32], linear: Linear) -> list[F32]:
        """Each sequence's activations times a matrix; override it to observe the inputs."""
        rounded = np.concatenate([sequence.round(x) for sequence, x in zip(self.sequences, xs, strict=True)])
        parts: list[F32] = []
        for name in linear.weight:
            start, step = 0, max(1, _CHUNK // rounded.shape[-1])
            while len(weight := self._read(name, start, start + step)):
                parts.append(rounded @ weight.T)
                start += step
        out = np.split(np.concatenate(parts, axis=-1), np.cumsum([len(x) for x in xs])[:-1])
        if linear.bias:
            bias = np.concatenate([self._read(name) for name in linear.bias])
            out = [y + bias for y in out]
        return out

    def _mlp(self, xs: list[F32], layer: Layer) -> list[F32]:
        hidden = self.linear(xs, layer.up)
        if self.decoder.activation == "gegelu":
            limit = self.decoder.gegelu_limit
            return self.linear([gegelu(h, limit) for h in hidden], layer.down)
        if self.decoder.gated:
            halves = [np.split(h, 2, axis=-1) for h in hidden]
            return self.linear([silu(gate) * up for gate, up in halves], layer.down)
        return self.linear([gelu_new(h) for h in hidden], layer.down)

    def _attend(self, n: int, layer: Layer, sequence: BatchSequence, qkv: F32, positions: np.ndarray) -> F32:
        d, start, stop = self.decoder, self.position, self.position + len(qkv)
        q_HTD, k_GTD, v_GTD = split_heads(d, qkv)
        if d.rope is not None:
            cos, sin = d.rope.tables(positions, stop)
            q_HTD, k_GTD = rotate(q_HTD, cos, sin), rotate(k_GTD, cos, sin)
        k_GSD, v_GSD = sequence.remember(n, start, k_GTD, v_GTD)

        out_HTD = np.empty_like(q_HTD)
        for head in range(d.heads):  # one at a time: the scores of all would be the largest thing in memory
            group = head * d.kv_heads // d.heads
            if head == 0 or layer.sparse is not None:
                seen_TS = visible(layer, head, positions, np.arange(stop))
            scores_TS = (q_HTD[head] * d.attention_scale) @ k_GSD[group].T
            out_HTD[head] = softmax(np.where(seen_TS, scores_TS, -np.inf)) @ v_GSD[group]
        return out_HTD.transpose(1, 0, 2).reshape(len(qkv), d.q_size)


class ReferenceBackend:
    """The reference as a backend like any other."""

    name = "reference"

    def __init__(
        self, decoder: Decoder, read: ReadTensor, context: int | None = None, rounding: Rounding = lambda x: x
    ) -> None:
        self._reference = Reference(decoder, read, context, (rounding,))
        self.vocab_size = decoder.vocab_size
        self.context = self._reference.context

    @property
    def position(self) -> int:
        """Tokens in the KV cache."""
        return self._reference.position

    def forward(self, tokens: list[int], all_logits: bool) -> F32:
        """Append tokens; logits [T, vocab_size], or [1, vocab_size] of the last."""
        return self._reference.forward(tokens, all_logits)[0]

    def trim(self, position: int) -> None:
        """Forget all tokens from `position` on."""
        self._reference.trim(position)

    def close(self) -> None:
        """Drop the cache."""
        self._reference.close()


def _add(sequences: list[BatchSequence], added: list[F32]) -> None:
    for sequence, a in zip(sequences, added, strict=True):
        sequence.x_TE = sequence.x_TE + a


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """Root-mean-square norm over the last axis (RMSNorm, arXiv:1910.07467)."""
    scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))
    out: F32 = x * scale.astype(np.float32) * weight
    return out


def layer_norm(x: F32, weight: F32, bias: F32, eps: float) -> F32:
    """LayerNorm over the last axis (arXiv:1607.06450)."""
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = 1 / np.sqrt(np.mean(centred * centred, axis=-1, keepdims=True) + np.float32(eps))
    out: F32 = centred * scale.astype(np.float32) * weight + bias
    return out


def silu(x: F32) -> F32:
    """x * sigmoid(x), without overflow at either end."""
    out: F32 = x * (0.5 * (1 + np.tanh(0.5 * x)))
    return out


def gelu_new(x: F32) -> F32:
    """GELU by its tanh approximation (arXiv:1606.08415), as GPT-2 and the first Phis have it."""
    out: F32 = 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)))
    return out


def gegelu(x: F32, limit: float) -> F32:
    """phi-3-small's MLP: gate and linear part alternate; gate * sigmoid(1.702 gate) * (linear + 1), both clipped."""
    gate, linear = np.minimum(x[..., ::2], np.float32(limit)), np.clip(x[..., 1::2], -limit, limit)
    out: F32 = (gate * (0.5 * (1 + np.tanh(np.float32(0.851) * gate))) * (linear + 1)).astype(np.float32)
    return out


def split_heads(d: Decoder, qkv: F32) -> tuple[F32, F32, F32]:
    """Queries [H, T, D], keys and values [G, T, D] of the fused projection [T, width]."""
    if not d.qkv_by_group:
        q, k, v = np.split(qkv, [d.q_size, d.q_size + d.kv_size], axis=-1)
        return _heads(q, d.heads), _heads(k, d.kv_heads), _heads(v, d.kv_heads)
    groups = qkv.reshape(len(qkv), d.kv_heads, -1, d.head_dim)
    q = groups[:, :, :-2].reshape(len(qkv), d.heads, d.head_dim)
    return q.transpose(1, 0, 2), groups[:, :, -2].transpose(1, 0, 2), groups[:, :, -1].transpose(1, 0, 2)


def softmax(x: F32) -> F32:
    """Softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    out: F32 = e / e.sum(axis=-1, keepdims=True)
    return out


def rotate(x_HTD: F32, cos: F32, sin: F32) -> F32:
    """Rotate the pairs (d, d + dims/2) of each head's first `dims` values, as Hugging Face does; the rest stays."""
    half = cos.shape[-1]
    a, b, rest = np.split(x_HTD, [half, 2 * half], axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)


def _heads(x: F32, heads: int) -> F32:
    return x.reshape(len(x), heads, -1).transpose(1, 0, 2)


def round_int8(x: F32, block: int = 32) -> F32:
    """Activations as llama.cpp's and onnxruntime's int8 kernels see them: 8 bits, a scale per block."""
    blocks = np.pad(x, [(0, 0), (0, -x.shape[-1] % block)]).reshape(-1, block)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    out: F32 = (np.rint(blocks / np.where(scale == 0, 1, scale)) * scale).reshape(len(x), -1)[:, : x.shape[-1]]
    return out


def round_float16(x: F32) -> F32:
    """Activations as a float16 graph sees them."""
    return x.astype(np.float16).astype(np.float32)
