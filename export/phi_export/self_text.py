"""Text that a model writes itself, to calibrate on: what it has learned to say is what has to survive.

Sampled from the model as it is, all windows at once; of a chat model half of them begin as a user's turn, the others
with a token drawn from the vocabulary, as LLM-QAT has it (arXiv:2305.17888).
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from phi_export.forward import TorchDecoder, Weights, product_type
from phi_runtime.backends.reference import ReadTensor
from phi_runtime.chat import chat_name, get_format
from phi_runtime.checkpoint import Checkpoint
from phi_runtime.decoder import Decoder, Layer, visible
from phi_runtime.tokenizer import Tokenizer

_SEED = 0
_EVERY = 64  # tokens between two words on progress

Progress = Callable[[str], None]


class _Decoding(TorchDecoder):
    """A decoder that goes on token by token, keys and values of the tokens before at hand."""

    def __init__(self, decoder: Decoder, read: ReadTensor, length: int, batch: int) -> None:
        super().__init__(decoder, read, length, product_type())
        shape = (len(decoder.layers), batch, decoder.kv_heads, length, decoder.head_dim)
        self._keys, self._values = torch.zeros(shape), torch.zeros(shape)
        self._layer = 0

    def goto(self, at: int) -> None:
        """Say which token of its window comes next."""
        self._places = slice(at, at + 1)

    def layer(self, n: int, x_BTE: Tensor, weights: Weights) -> Tensor:
        """What leaves a layer for one more token of each text, [B, 1, E]."""
        self._layer = n
        return super().layer(n, x_BTE, weights)

    def _attend(self, layer: Layer, qkv: Tensor) -> Tensor:
        d, now = self.decoder, self._places
        q, k, v = self._split_heads(qkv)
        self._keys[self._layer, :, :, now], self._values[self._layer, :, :, now] = self._rotate(k), v
        k, v = (cache[self._layer, :, :, : now.stop] for cache in (self._keys, self._values))
        seen = None
        if layer.sparse is not None or (layer.window or now.stop) < now.stop:
            places = np.arange(now.stop)
            each = [visible(layer, h, places[now], places) for h in range(d.heads)]
            seen = torch.from_numpy(np.stack(each).reshape(1, d.kv_heads, -1, now.stop))
        # One token of each head: those that share keys and values stand where tokens would.
        q = self._rotate(q).reshape(len(q), d.kv_heads, -1, d.head_dim)
        out = F.scaled_dot_product_attention(q, k, v, seen, scale=d.attention_scale)
        return out.reshape(*qkv.shape[:2], d.q_size)


@torch.no_grad()
def self_text(checkpoint: Checkpoint, count: int, length: int, progress: Progress = lambda _: None) -> list[list[int]]:
    """`count` windows of `length` tokens that the model draws, at its own probabilities."""
    d = checkpoint.config.decoder()
    random = torch.Generator().manual_seed(_SEED)
    windows = _beginnings(checkpoint, count, random)
    model = _Decoding(d, checkpoint.read, length, count)
    weights = model.weights(*(linear for layer in d.layers for linear in layer.linears()), d.head)
    for at in range(length - 1):
        if at % _EVERY == 0:
            progress(f"text that the model writes: {at} of {length} tokens of {count} windows")
        model.goto(at)
        x_BTE = model.embed([[window[at]] for window in windows])
        for n in range(len(d.layers)):
            x_BTE = model.layer(n, x_BTE, weights)
        drawn = torch.multinomial(model.logits(x_BTE, weights)[:, 0].softmax(-1), 1, generator=random)
        for window, token in zip(windows, drawn[:, 0].tolist(), strict=True):
            if len(window) == at + 1:
                window.append(token)
    return windows


def _beginnings(checkpoint: Checkpoint, count: int, random: torch.Generator) -> list[list[int]]:
    tokenizer = Tokenizer(checkpoint.folder)
    name = chat_name(checkpoint.folder)
    drawn = torch.randint(0, tokenizer.largest_id + 1, (count,), generator=random).tolist()
    windows = [[token] for token in drawn]
    if name is not None:
        rendered = get_format(name).render([{"role": "user", "content": "\0"}])
        turn = tokenizer.encode(rendered[: rendered.index("\0")])
        windows[1::2] = [list(turn) for _ in windows[1::2]]
    return windows
