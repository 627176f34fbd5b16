"""A larger model begun with a smaller one's weights, as phi-2 was with phi-1.5's ("scaled knowledge transfer":
Microsoft Research's blog and talk of December 2023 name depth maps, weight reuse and tiling, but no formulas).

Layer n of N begins as layer round(n / N * old) was, as Gopher's did (arXiv:2112.11446). Ways:

- random: nothing is taken over.
- reuse: the small matrix in a corner of the large one, the rest drawn anew.
- tile: the large matrix filled with copies of the small one.
- preserve: copies divided by their number, so that the large model says what the small one does (arXiv:2409.12903);
  a layer that came to be twice adds nothing the second time; noise, if any, cancels out over the copies.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from phi_runtime.architecture.checkpoint import Checkpoint, open_checkpoint
from phi_runtime.architecture.config import AnyConfig
from phi_runtime.architecture.decoder import F32, Decoder
from phi_runtime.errors import OutputExistsError, UsageError
from phi_train.checkpoints.write import write_checkpoint
from phi_train.recipes.published import INIT_STD

METHODS = ("random", "reuse", "tile", "preserve")


@dataclass(frozen=True)
class GrownPart:
    """One tensor: where it comes from, how its rows and columns are composed there and here, and whether it is one
    that a repeated layer adds by, or that rows are looked up in.
    """

    name: str
    source: str
    rows: tuple[tuple[int, int], ...]  # (old, new) of each block
    columns: tuple[int, int] | None  # of a matrix
    adds: bool
    repeated: bool
    looked_up: bool = False


def grow(source: Path, config: AnyConfig, method: str, out: Path, noise: float = 0.0, seed: int = 0) -> None:
    """Write a checkpoint of `config`, begun with the one in `source`; it takes over the tokenizer.

    noise: standard deviation that "preserve" adds, relative to that of the matrix. Raises UsageError for an unknown
    method or a model that cannot be grown into, OutputExistsError.
    """
    if method not in METHODS:
        raise UsageError(f"method {method!r} is none of {', '.join(METHODS)}")
    if out.exists():
        raise OutputExistsError(f"{out}: is there already; choose another --out")
    small = open_checkpoint(source)
    if small.config.model_type != config.model_type:
        raise UsageError(f"{source}: is of model_type {small.config.model_type}, not {config.model_type}")
    if small.config.vocab_size != config.vocab_size:
        raise UsageError(f"{source}: has {small.config.vocab_size} tokens, not {config.vocab_size}")
    if method == "preserve":
        _check_preserved(small.config.decoder(), config.decoder())
    random = np.random.default_rng(seed)
    shapes = config.tensor_shapes()
    weights = {}
    for part in _parts(small, config):
        grown = _grown(small.read(part.source), part, method, noise, random)
        assert grown.shape == shapes[part.name], part
        weights[part.name] = torch.from_numpy(grown)
    write_checkpoint(out, config, weights, source)


def _check_preserved(old: Decoder, new: Decoder) -> None:
    sizes = {
        "hidden_size": (old.hidden_size, new.hidden_size),
        "intermediate_size": (old.intermediate_size, new.intermediate_size),
        "the number of heads": (old.heads, new.heads),
        "the number of key-value heads": (old.kv_heads, new.kv_heads),
    }
    for what, (a, b) in sizes.items():
        if b % a:
            raise UsageError(f"preserve: {what} {b} is no multiple of {a}; take tile, or another size")
    if old.head_dim != new.head_dim:
        raise UsageError(f"preserve: heads of {new.head_dim} are not heads of {old.head_dim}; take tile")
    if len(new.layers) < len(old.layers):
        raise UsageError(f"preserve: {len(new.layers)} layers are fewer than {len(old.layers)}")
    if new.tied or new.qkv_by_group:
        raise UsageError("preserve: a head tied to the embedding, or queries grouped in rows, cannot be; take tile")


def _parts(small: Checkpoint, config: AnyConfig) -> Iterator[GrownPart]:
    old, new = small.config.decoder(), config.decoder()
    hidden = (old.hidden_size, new.hidden_size)
    heads, kv = (old.q_size, new.q_size), (old.kv_size, new.kv_size)
    wide = (old.intermediate_size, new.intermediate_size)
    vocabulary = ((old.vocab_size, new.vocab_size),)
    qkv = (heads, kv, kv)
    yield GrownPart(new.embedding, old.embedding, vocabulary, hidden, False, False, True)
    if new.positions is not None and old.positions is not None:
        yield GrownPart(new.positions, old.positions, ((old.context, new.context),), hidden, False, False, True)
    count, had = len(new.layers), len(old.layers)
    mapped = [min(had - 1, round(n / count * had)) for n in range(count)]
    for n, layer in enumerate(new.layers):
        was, again = old.layers[mapped[n]], n > 0 and mapped[n] == mapped[n - 1]
        for norm, before in ((layer.attention_norm, was.attention_norm), (layer.mlp_norm, was.mlp_norm)):
            if norm is not None and before is not None:
                yield GrownPart(norm.weight, before.weight, (hidden,), None, False, again)
                if norm.bias is not None and before.bias is not None:
                    yield GrownPart(norm.bias, before.bias, (hidden,), None, False, again)
        split = len(layer.qkv.weight) == 3
        up = (wide, wide) if new.gated else (wide,)
        for linear, before_, rows, columns, adds in (
            (layer.qkv, was.qkv, qkv, hidden, False),
            (layer.o, was.o, (hidden,), heads, True),
            (layer.up, was.up, up, hidden, False),
            (layer.down, was.down, (hidden,), wide, True),
        ):
            apart = split and linear is layer.qkv
            for i, (name, origin) in enumerate(zip(linear.weight, before_.weight, strict=True)):
                yield GrownPart(name, origin, (rows[i],) if apart else rows, columns, adds, again)
            for i, (name, origin) in enumerate(zip(linear.bias, before_.bias, strict=True)):
                yield GrownPart(name, origin, (rows[i],) if apart else rows, None, adds, again)
    yield GrownPart(new.final_norm.weight, old.final_norm.weight, (hidden,), None, False, False)
    if new.final_norm.bias is not None and old.final_norm.bias is not None:
        yield GrownPart(new.final_norm.bias, old.final_norm.bias, (hidden,), None, False, False)
    if not new.tied:
        yield GrownPart(new.head.weight[0], old.head.weight[0], vocabulary, hidden, False, False)
        for name, origin in zip(new.head.bias, old.head.bias, strict=True):
            yield GrownPart(name, origin, vocabulary, None, False, False)


def _grown(w: F32, part: GrownPart, method: str, noise: float, random: np.random.Generator) -> F32:
    """A tensor of the new size."""
    columns = part.columns[1] if part.columns is not None else 1
    drawn = random.standard_normal((sum(new for _, new in part.rows), columns), dtype=np.float32) * np.float32(INIT_STD)
    if part.columns is None:  # norms and biases: copies, and for what is drawn anew ones and zeros
        drawn = np.full_like(drawn, 0.0 if part.name.endswith(".bias") else 1.0)
    if method == "random":
        return drawn.reshape(-1) if part.columns is None else drawn
    cuts = np.cumsum([0, *(old for old, _ in part.rows)])
    blocks, at = [], 0
    matrix = w.reshape(len(w), -1)
    for (a, b), (_, rows) in zip(pairwise(cuts), part.rows, strict=True):
        block = drawn[at : at + rows].copy()
        if method == "reuse":
            kept = min(rows, b - a), min(columns, matrix.shape[1])
            block[: kept[0], : kept[1]] = matrix[a:b][: kept[0], : kept[1]]
        else:
            times = -(-rows // (b - a)), -(-columns // matrix.shape[1])
            block = np.tile(matrix[a:b], times)[:rows, :columns]
        blocks.append(block)
        at += rows
    grown: F32 = np.concatenate(blocks)
    if method == "preserve":
        grown = _preserved(grown, matrix, part, noise, random)
    return grown.reshape(-1) if part.columns is None else grown


def _preserved(grown: F32, matrix: F32, part: GrownPart, noise: float, random: np.random.Generator) -> F32:
    if part.repeated and part.adds:
        return np.zeros_like(grown)
    if part.columns is None or part.looked_up:
        return grown
    copies = grown.shape[1] // matrix.shape[1]
    grown = grown / np.float32(copies)
    if noise and copies > 1:
        eps = random.standard_normal((len(grown), copies, matrix.shape[1]), dtype=np.float32)
        eps -= eps.mean(axis=1, keepdims=True)  # all copies are given the same: it cancels out
        grown = grown + np.float32(noise * grown.std()) * eps.reshape(len(grown), -1)
    return grown
