"""The forward pass of a calibration: the Hessian (X^T X) of every matrix's inputs, a layer at a time.

Of each layer it keeps the scales that equalise it, under these the factors of its matrices' inputs, the largest
magnitudes of its cache, and its inputs for the windows that sensitivity is measured on.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from phi_export.calibrate.cache import load_array, save_array, save_factor
from phi_export.calibrate.equalise import choose_scales, input_scales
from phi_export.calibrate.forward import TorchDecoder
from phi_export.calibrate.sensitivity import layer_input_path, sensitivity_windows
from phi_export.quantize.gptq import factorise, groups
from phi_runtime.architecture.checkpoint import Checkpoint
from phi_runtime.architecture.decoder import F32, Decoder, Linear
from phi_runtime.errors import CheckpointError
from phi_train.models.precision import product_type

BATCH = 4096  # tokens taken through a layer at a time; bounds the memory
_STRIPES = 8  # of columns, whose products are taken one after the other: the other triangle is not computed
_ROUNDED = 1 + 2**-8  # of a hessian's diagonal

Progress = Callable[[str], None]


class _Hessians:
    """Adds up the Hessian of each matrix's inputs, group by group (`gptq.groups`), upper triangles alone."""

    def __init__(self) -> None:
        self._found: dict[str, Tensor] = {}

    def see(self, linear: Linear, x_BTC: Tensor) -> None:
        """Count activations that enter a matrix."""
        x = x_BTC.reshape(-1, x_BTC.shape[-1])
        count, width = groups(x.shape[1]), x.shape[1] // groups(x.shape[1])
        hessians = self._found.setdefault(linear.weight[0], torch.zeros(count, width, width))
        for n, hessian in enumerate(hessians):
            own = x[:, n::count].contiguous()
            for start, stop in _stripes(width):
                hessian[start:stop, start:] += own[:, start:stop].T @ own[:, start:]

    def squares(self, linear: Linear, count: int) -> F32:
        """The mean squares of what enters a matrix, [columns]."""
        hessians = self._found[linear.weight[0]]
        return np.asarray((hessians.diagonal(dim1=1, dim2=2).T.reshape(-1) / count).numpy())

    def take(self, linear: Linear, count: int) -> list[F32]:
        """The Hessians of a matrix's inputs, per token, one for each group; forgets them."""
        hessians = self._found.pop(linear.weight[0])
        for hessian in hessians:
            for start, stop in _stripes(len(hessian)):
                hessian[stop:, start:stop] = hessian[start:stop, stop:].T
            # Products of bfloat16 are rounded to it, which could leave a matrix that has no factor.
            hessian.diagonal().mul_(_ROUNDED)
        return list(hessians.div_(count).numpy())


def _stripes(width: int) -> Iterator[tuple[int, int]]:
    step = -(-width // _STRIPES)
    for start in range(0, width, step):
        yield start, min(width, start + step)


class _Cache:
    """What calibration sees of keys before they are rotated, and of values."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._peaks: Tensor | None = None
        self._squares = torch.zeros(decoder.kv_heads, decoder.head_dim)

    def see(self, k_BGTD: Tensor, v_BGTD: Tensor) -> None:
        """Count keys and values."""
        self._squares += k_BGTD.square().sum(dim=(0, 2))
        rope = self._decoder.rope
        if rope is not None:  # a rotated pair keeps its length, wherever it is rotated to
            half = rope.dims // 2
            lengths = torch.hypot(k_BGTD[..., :half], k_BGTD[..., half : 2 * half]) * rope.attention_factor
            k_BGTD = torch.cat([lengths, lengths, k_BGTD[..., 2 * half :]], dim=-1)
        found = torch.stack([k_BGTD.abs().amax(dim=(0, 2)), v_BGTD.abs().amax(dim=(0, 2))])
        self._peaks = found if self._peaks is None else torch.maximum(self._peaks, found)

    def take(self, count: int) -> tuple[F32, F32]:
        """Of a layer, the largest magnitudes [2, kv_heads, head_dim] and the keys' mean squares [kv_heads, head_dim];
        forgets them.
        """
        assert self._peaks is not None
        peaks, squares = self._peaks.numpy(), (self._squares / count).numpy()
        self._peaks, self._squares = None, torch.zeros_like(self._squares)
        return peaks, squares


@torch.no_grad()
def gather(checkpoint: Checkpoint, texts: list[list[int]], folder: Path, progress: Progress) -> None:
    """Keep the scales of each layer, the factors of all matrices under them, what enters each layer for the windows
    that sensitivity is measured on, and what has become of all windows after the last layer done.
    """
    d = checkpoint.config.decoder()
    hessians, cache = _Hessians(), _Cache(d)
    model = TorchDecoder(d, checkpoint.read, len(texts[0]), product_type(), hessians.see, cache.see)
    count = sum(map(len, texts))
    begun, state = _resume(folder, len(texts))
    x_BTE = model.embed(texts) if state is None else torch.from_numpy(state)
    at_a_time = max(1, BATCH // len(texts[0]))

    def keep(linear: Linear, scale: F32) -> None:
        found = hessians.take(linear, count)
        for n, hessian in enumerate(found):
            if not np.isfinite(hessian).all():
                raise CheckpointError(
                    f"{checkpoint.folder}: its activations grow beyond float32 on the calibration text"
                )
            own = scale[n :: len(found)]
            hessian /= own[:, None]
            hessian /= own
        save_factor(folder, linear.weight[0], factorise(*found))

    for n in range(begun, len(d.layers)):
        layer = d.layers[n]
        progress(f"layer {n + 1} of {len(d.layers)}: activations")
        save_array(layer_input_path(folder, n), sensitivity_windows(x_BTE, checkpoint).numpy())
        weights = model.weights(*layer.linears())
        for batch in torch.split(x_BTE, at_a_time):  # in place: what a layer makes of windows stands where they stood
            batch.copy_(model.layer(n, batch, weights))
        del weights
        peaks, keys = cache.take(count)
        scales = choose_scales(d, layer, {i: hessians.squares(i, count) for i in layer.linears()}, keys)
        save_array(folder / f"kv-{n + 1:04d}.npy", peaks)
        save_array(folder / f"scales-{n + 1:04d}.npy", np.concatenate(scales.parts()))
        progress(f"layer {n + 1} of {len(d.layers)}: factorising Hessians")
        for linear, scale in input_scales(d, layer, scales).items():
            keep(linear, scale)
        save_array(folder / f"after-{n + 1:04d}.npy", x_BTE.numpy())
        (folder / f"after-{n:04d}.npy").unlink(missing_ok=True)
    progress("the head: activations")
    save_array(layer_input_path(folder, len(d.layers)), sensitivity_windows(x_BTE, checkpoint).numpy())
    for batch in torch.split(x_BTE, at_a_time):
        hessians.see(d.head, model.norm(batch, d.final_norm))
    keep(d.head, np.ones(d.hidden_size, np.float32))


def _resume(folder: Path, windows: int) -> tuple[int, np.ndarray | None]:
    """The layers that an interrupted run had done, and the activations after them."""
    for path in sorted(folder.glob("after-*.npy"), reverse=True):
        state = load_array(path)
        if state.ndim == 3 and len(state) == windows:
            return int(path.stem.removeprefix("after-")), state
    return 0, None
