"""Equalisation: powers of two moved between matrices so that their inputs are of similar size, channel by channel.

Engines round activations to 8 bits in blocks along a row, and the cache too; a few channels many times as large as
their neighbours take the bits of all of these. What divides a channel where it is made and multiplies the column that
reads it changes nothing of what the model computes: powers of two are exact in floating point. (SmoothQuant,
arXiv:2211.10438, and AWQ, arXiv:2306.00978, move such scales for activations and for weights.)

There are four places: a norm and what reads it, values and the output projection, the gated half of an MLP and its down
projection, and keys against queries, where the two of a rotated pair go together.
"""

import io
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt

from phi_runtime.architecture.checkpoint import Checkpoint, Tensor
from phi_runtime.architecture.decoder import F32, Decoder, Layer, Linear
from phi_runtime.errors import BundleError
from phi_runtime.files import write_file

FILE = "phi-scales.npy"  # of a bundle: the exponents of all layers, one after the other
_STRENGTH = 0.5  # of the root mean square: the rest stays with the activations, so that weights keep their shape too
_MOST = 6  # bits either way

Exponents = npt.NDArray[np.int8]


@dataclass(frozen=True)
class Scales:
    """Exponents of two of one layer, by channel: an input x is divided by 2**exponent where it is made.

    norm: what the first norm gives [E]. mlp_norm: what the second gives [E], empty where there is none. values,
    keys [kv_size]. hidden: what the down projection reads [intermediate_size], empty where that cannot be scaled.
    """

    norm: Exponents
    mlp_norm: Exponents
    values: Exponents
    keys: Exponents
    hidden: Exponents

    def parts(self) -> tuple[Exponents, ...]:
        """All of them, in the file's order."""
        return self.norm, self.mlp_norm, self.values, self.keys, self.hidden


def widths(d: Decoder, layer: Layer) -> tuple[int, ...]:
    """Of the parts of a layer's `Scales`."""
    second = 0 if layer.mlp_norm is None else d.hidden_size
    return d.hidden_size, second, d.kv_size, d.kv_size, d.intermediate_size if _scales_hidden(d) else 0


def _scales_hidden(d: Decoder) -> bool:
    return d.activation == "silu"  # linear in its up half; the others are not


def unpack(d: Decoder, flat: Exponents) -> list[Scales]:
    """The scales of each layer, from the exponents of all. Raises ValueError for another count."""
    found = []
    at = 0
    for layer in d.layers:
        cuts = at + np.cumsum((0, *widths(d, layer)))
        found.append(Scales(*(flat[a:b] for a, b in pairwise(cuts))))
        at = int(cuts[-1])
    if flat.shape != (at,):
        raise ValueError(f"{flat.shape} exponents for {at} channels")
    return found


def choose(squares: F32) -> Exponents:
    """Exponents for channels of some mean squares [C]; 0 for a channel that is never used."""
    used = squares > 1e-9 * squares.max(initial=0)
    logs = np.log2(np.maximum(squares, np.float32(1e-30))) / 2 * _STRENGTH
    middle = logs[used].mean() if used.any() else 0.0
    return np.where(used, np.clip(np.rint(logs - middle), -_MOST, _MOST), 0).astype(np.int8)


def choose_scales(d: Decoder, layer: Layer, squares: dict[Linear, F32], keys: F32) -> Scales:
    """From the mean squares of what enters each matrix, and of keys before their rotation [kv_heads, head_dim]."""
    empty = np.zeros(0, np.int8)
    norm = squares[layer.qkv]
    if layer.mlp_norm is None:  # both branches read the same norm
        norm = np.maximum(norm, squares[layer.up])
    by_head = squares[layer.o].reshape(d.kv_heads, -1, d.head_dim).mean(axis=1)
    if d.rope is not None:
        half = d.rope.dims // 2
        pairs = (keys[:, :half] + keys[:, half : 2 * half]) / 2
        keys = np.concatenate([pairs, pairs, keys[:, 2 * half :]], axis=1)
    return Scales(
        norm=choose(norm),
        mlp_norm=empty if layer.mlp_norm is None else choose(squares[layer.up]),
        values=choose(by_head.reshape(-1)),
        keys=np.concatenate([choose(k) for k in keys]),
        hidden=choose(squares[layer.down]) if _scales_hidden(d) else empty,
    )


def input_scales(d: Decoder, layer: Layer, s: Scales) -> dict[Linear, F32]:
    """What each matrix's columns are multiplied with, and what it reads is divided by."""
    columns = {layer.qkv: _power(s.norm), layer.up: _power(s.mlp_norm if layer.mlp_norm else s.norm)}
    values = _power(s.values).reshape(d.kv_heads, 1, d.head_dim)
    columns[layer.o] = np.broadcast_to(values, (d.kv_heads, d.heads // d.kv_heads, d.head_dim)).reshape(-1)
    columns[layer.down] = _power(s.hidden) if len(s.hidden) else np.ones(d.intermediate_size, np.float32)
    return columns


def _power(exponents: Exponents) -> F32:
    return np.ldexp(np.float32(1), exponents.astype(np.int32)).astype(np.float32)


@dataclass(frozen=True)
class ScaledTensor(Tensor):
    """A tensor whose rows (of a vector: elements) and columns are multiplied as they are read."""

    of: Tensor = field(kw_only=True)
    rows: F32 | None = None
    columns: F32 | None = None

    def read(self, start: int = 0, stop: int | None = None) -> F32:
        """Rows start..stop as float32, scaled."""
        out = self.of.read(start, stop)
        if self.rows is not None:
            rows = self.rows[start:stop]
            out = out * (rows if out.ndim == 1 else rows[:, None])
        return out if self.columns is None else out * self.columns


def equalised(checkpoint: Checkpoint, scales: list[Scales] | None) -> Checkpoint:
    """The same model with its scales moved; itself where there are none to move."""
    if scales is None:
        return checkpoint
    d = checkpoint.config.decoder()
    tensors = dict(checkpoint.tensors)

    def scale(names: tuple[str, ...], rows: F32 | None, columns: F32 | None = None) -> None:
        """Scale tensors that stand one below the other."""
        at = 0
        for name in names:
            t = tensors[name]
            own = None if rows is None else rows[at : at + t.shape[0]]
            at += t.shape[0]
            tensors[name] = ScaledTensor(t.name, t.dtype, t.shape, t.path, t.offset, own, columns, of=t)

    for layer, s in zip(d.layers, scales, strict=True):
        columns = input_scales(d, layer, s)
        norms = [(layer.attention_norm, s.norm)] + ([(layer.mlp_norm, s.mlp_norm)] if layer.mlp_norm else [])
        for norm, exponents in norms:
            scale((norm.weight,), _power(-exponents))
            if norm.bias is not None:
                scale((norm.bias,), _power(-exponents))
        made = _qkv_rows(d, s)
        scale(layer.qkv.weight, made, columns[layer.qkv])
        scale(layer.qkv.bias, made)
        scale(layer.o.weight, None, columns[layer.o])
        gate = np.zeros(d.intermediate_size, np.int8)
        hidden = _power(np.concatenate([gate, -s.hidden])) if len(s.hidden) else None
        scale(layer.up.weight, hidden, columns[layer.up])
        scale(layer.up.bias, hidden)
        scale(layer.down.weight, None, columns[layer.down])
    return replace(checkpoint, tensors=tensors)


def _qkv_rows(d: Decoder, s: Scales) -> F32:
    """What the rows of queries, keys and values are multiplied with."""
    keys = _power(-s.keys).reshape(d.kv_heads, 1, d.head_dim)
    queries = np.repeat(_power(s.keys).reshape(keys.shape), d.heads // d.kv_heads, axis=1)
    values = _power(-s.values).reshape(d.kv_heads, d.head_dim)
    if d.qkv_by_group:
        return np.concatenate([queries, keys, values[:, None]], axis=1).reshape(-1)
    return np.concatenate([queries.reshape(-1), keys.reshape(-1), values.reshape(-1)])


def write_scales(folder: Path, scales: list[Scales]) -> None:
    """Keep them in a bundle."""
    flat = np.concatenate([part for s in scales for part in s.parts()])
    buffer = io.BytesIO()
    np.save(buffer, flat, allow_pickle=False)
    write_file(folder / FILE, buffer.getvalue())


def read_scales(folder: Path, d: Decoder) -> list[Scales] | None:
    """Those of a bundle, None where it has none. Raises BundleError."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        flat = np.load(path, allow_pickle=False)
        if flat.dtype != np.int8 or np.abs(flat.astype(np.int32)).max(initial=0) > _MOST:
            raise ValueError("not exponents")
        return unpack(d, flat)
    except (OSError, ValueError, EOFError):
        raise BundleError(f"{path}: is damaged; export the bundle again") from None


def scales_bytes(d: Decoder) -> int:
    """Of the file."""
    return 128 + sum(sum(widths(d, layer)) for layer in d.layers)
