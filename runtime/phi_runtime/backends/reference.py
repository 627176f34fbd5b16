"""The reference: a Phi-3 decoder in plain NumPy, float32 throughout, slow and clear.

The fast engines and every exported bundle are held to it. It asks for one tensor at a time, so
it never holds the model.

Shapes: T new tokens, S tokens in the cache with them, H heads, G key-value heads, D head_dim, E hidden_size.
"""

from collections.abc import Callable

import numpy as np

from phi_runtime.checkpoint import F32
from phi_runtime.config import Phi3Config

ReadTensor = Callable[[str], F32]
# What an engine does to the activations [T, width] before it multiplies them with a matrix.
Rounding = Callable[[F32], F32]


class ReferenceBackend:
    """Runs an architecture over whatever `read` gives for each tensor name of the checkpoint.

    `rounding` imitates an engine's arithmetic, to learn how far that alone moves the logits.
    """

    name = "reference"

    def __init__(
        self,
        config: Phi3Config,
        read: ReadTensor,
        context: int | None = None,
        rounding: Rounding = lambda x: x,
    ) -> None:
        self.config = config
        self.vocab_size = config.vocab_size
        self.context = context or config.max_position_embeddings
        self._read = read
        self._round = rounding
        self._position = 0
        shape = (config.num_hidden_layers, config.num_key_value_heads, self.context, config.head_dim)
        self._keys_LGSD = np.zeros(shape, np.float32)
        self._values_LGSD = np.zeros(shape, np.float32)

    @property
    def position(self) -> int:
        """Tokens in the KV cache."""
        return self._position

    def forward(self, tokens: list[int], every: bool) -> F32:
        """Append tokens; logits [T, vocab_size], or [1, vocab_size] of the last."""
        c, read = self.config, self._read
        x_TE: F32 = read("model.embed_tokens.weight")[np.asarray(tokens)]
        for layer in range(c.num_hidden_layers):
            p = f"model.layers.{layer}."
            normed_TE = rms_norm(x_TE, read(p + "input_layernorm.weight"), c.rms_norm_eps)
            attended_TE = self._attention(layer, self._linear(normed_TE, p + "self_attn.qkv_proj.weight"))
            x_TE = x_TE + self._linear(attended_TE, p + "self_attn.o_proj.weight")
            normed_TE = rms_norm(x_TE, read(p + "post_attention_layernorm.weight"), c.rms_norm_eps)
            gate, up = np.split(self._linear(normed_TE, p + "mlp.gate_up_proj.weight"), 2, axis=-1)
            x_TE = x_TE + self._linear(silu(gate) * up, p + "mlp.down_proj.weight")
        self._position += len(tokens)
        if not every:
            x_TE = x_TE[-1:]
        normed_TE = rms_norm(x_TE, read("model.norm.weight"), c.rms_norm_eps)
        return self._linear(normed_TE, "lm_head.weight")

    def rewind(self, position: int) -> None:
        """Forget all tokens from `position` on."""
        self._position = position

    def close(self) -> None:
        """Drop the cache."""
        self._keys_LGSD = self._values_LGSD = np.zeros((0, 0, 0, 0), np.float32)

    def _linear(self, x: F32, name: str) -> F32:
        out: F32 = self._round(x) @ self._read(name).T
        return out

    def _attention(self, layer: int, qkv: F32) -> F32:
        c, start = self.config, self._position
        count = len(qkv)
        stop = start + count
        q, k, v = np.split(qkv, [c.hidden_size, c.hidden_size + c.kv_size], axis=-1)
        cos, sin = rope_tables(c, np.arange(start, stop))
        q_HTD = rotate(_heads(q, c.num_attention_heads), cos, sin)
        self._keys_LGSD[layer, :, start:stop] = rotate(_heads(k, c.num_key_value_heads), cos, sin)
        self._values_LGSD[layer, :, start:stop] = _heads(v, c.num_key_value_heads)

        group = c.num_attention_heads // c.num_key_value_heads
        k_HSD = np.repeat(self._keys_LGSD[layer, :, :stop], group, axis=0)
        v_HSD = np.repeat(self._values_LGSD[layer, :, :stop], group, axis=0)
        scores_HTS = (q_HTD * c.head_dim**-0.5) @ k_HSD.transpose(0, 2, 1)
        distance_TS = np.arange(start, stop)[:, None] - np.arange(stop)[None, :]
        visible_TS = distance_TS >= 0
        if (window := c.window()) is not None:
            visible_TS &= distance_TS < window
        scores_HTS = np.where(visible_TS, scores_HTS, -np.inf)
        out_HTD = softmax(scores_HTS) @ v_HSD
        return out_HTD.transpose(1, 0, 2).reshape(count, c.hidden_size)


def rms_norm(x: F32, weight: F32, eps: float) -> F32:
    """Root-mean-square norm over the last axis (RMSNorm, arXiv:1910.07467)."""
    scale = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + np.float32(eps))
    out: F32 = x * scale.astype(np.float32) * weight
    return out


def silu(x: F32) -> F32:
    """x * sigmoid(x), without overflow at either end."""
    out: F32 = x * (0.5 * (1 + np.tanh(0.5 * x)))
    return out


def softmax(x: F32) -> F32:
    """Softmax over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    out: F32 = e / e.sum(axis=-1, keepdims=True)
    return out


def rope_tables(config: Phi3Config, positions: np.ndarray) -> tuple[F32, F32]:
    """cos and sin [len(positions), head_dim / 2] of the rotary embedding (arXiv:2104.09864)."""
    inv_freq = config.rope_theta ** (-np.arange(0, config.head_dim, 2) / config.head_dim)
    angles = positions[:, None] * inv_freq[None, :]
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def rotate(x_HTD: F32, cos: F32, sin: F32) -> F32:
    """Rotate the pairs (d, d + D/2), as Hugging Face's Phi-3 does."""
    a, b = np.split(x_HTD, 2, axis=-1)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def _heads(x: F32, heads: int) -> F32:
    return x.reshape(len(x), heads, -1).transpose(1, 0, 2)


def round_int8(x: F32) -> F32:
    """Activations as llama.cpp's and onnxruntime's int8 kernels see them: 8 bits, a scale per 32."""
    blocks = x.reshape(-1, 32)
    scale = np.abs(blocks).max(axis=1, keepdims=True) / 127
    out: F32 = (np.rint(blocks / np.where(scale == 0, 1, scale)) * scale).reshape(x.shape)
    return out


def round_float16(x: F32) -> F32:
    """Activations as a float16 graph sees them."""
    return x.astype(np.float16).astype(np.float32)
