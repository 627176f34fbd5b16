"""What a model does on real text, gathered once for all formats and plans.

Two passes, each a layer at a time. Forwards, the second moment of every matrix's inputs is gathered, and what error
feedback needs of it is kept (`kept`); this goes on where it was interrupted. Backwards, what an error of each matrix
costs at the end is found (`costs`) and written to `costs.json`, with which a calibration is complete.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from phi_export.calibration_text import BUILT_IN, calibration_windows
from phi_export.costs import measure_costs, shown, shown_path
from phi_export.equalise import Scales, choose_scales, equalised, input_scales, unpack
from phi_export.feedback import DAMPING, Factor, factorise
from phi_export.formats import Format, Item, Options, Type
from phi_export.forward import TorchDecoder, product_type
from phi_export.kept import load_array, load_factor, save_array, save_factor
from phi_export.quantize import finite
from phi_runtime.bundle import CalibratedOn, Source
from phi_runtime.checkpoint import Checkpoint
from phi_runtime.config import read_json
from phi_runtime.decoder import F32, Decoder, Linear
from phi_runtime.errors import CheckpointError
from phi_runtime.files import disk_full_named, locked, write_file

WINDOW = 512
BATCH = 4096  # tokens taken through a layer at a time; bounds the memory
_STRIPES = 8  # of columns, whose moments are taken one after the other: the other triangle is not computed
_ROUNDED = 1 + 2**-8  # of a moment's diagonal
_VERSION = 5
_COSTS = "costs.json"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class CalibrationText:
    """What to calibrate on: `text` as `calibration_windows` has it, how many windows of 512 tokens of it, and where to
    keep the outcome (by default in the checkpoint's folder).
    """

    text: str = BUILT_IN
    windows: int = 32
    cache: Path | None = None


@dataclass(frozen=True)
class Calibration:
    """The outcome, on disk. `costs` are nats of KL divergence, per item, of an error of one (relative, squared) as
    feedback leaves it behind; items are named as with `split_qkv`. Factors and costs are of the model under `scales`
    (`equalise.equalised`), one for each layer.
    """

    folder: Path
    decoder: Decoder
    on: CalibratedOn
    costs: dict[str, float]
    scales: list[Scales]
    scaled: bool = True

    def unscaled(self) -> "Calibration":
        """The same of the model as it is, for a format that does not equalise; costs are taken to be alike."""
        return replace(self, scaled=False)

    def cost(self, item: Item) -> float:
        """Of an item, or of its parts together."""
        if item.name in self.costs:
            return self.costs[item.name]
        return sum(c for name, c in self.costs.items() if name.startswith(f"{item.name}:"))

    def losses(self, module: Format, checkpoint: Checkpoint, options: Options) -> Callable[[Item, Type], float]:
        """The KL divergence, nats per token, to expect of storing an item as a type: its cost, times the error of the
        type on some of its rows, times what feedback makes of that.
        """

        @cache
        def loss(item: Item, name: str, fed: float) -> float:
            rows = np.concatenate([finite(checkpoint.tensors[item.tensor], a, b) for a, b in _some_rows(item)])
            error = float(np.square(module.rounded(rows, name, options) - rows).sum())
            return self.cost(item) * fed * error / max(float(np.square(rows).sum()), 1e-30)

        def of(item: Item, kind: Type) -> float:
            alone = item.role == "embedding" and not self.decoder.tied
            return loss(item, kind.name, 1.0 if alone else kind.fed_back / kind.error)

        return of

    def factor(self, tensor: str) -> Factor | None:
        """Of a matrix's inputs; None for the embedding, which has none."""
        for linear in linears(self.decoder):
            if tensor in linear.weight:
                factor = load_factor(self.folder, linear.weight[0])
                return factor if self.scaled else factor.unscaled(self._columns(linear))
        return None

    def _columns(self, linear: Linear) -> F32:
        """What the columns of a matrix are multiplied with."""
        for layer, scales in zip(self.decoder.layers, self.scales, strict=True):
            found = input_scales(self.decoder, layer, scales)
            if linear in found:
                return found[linear]
        return np.ones(self.decoder.hidden_size, np.float32)

    def kv_peaks(self) -> list[F32]:
        """Per layer, of keys and values under `scales`: the largest magnitudes of the text, [2, kv_heads, head_dim]."""
        shape = (2, self.decoder.kv_heads, self.decoder.head_dim)
        found = [load_array(self.folder / f"kv-{n + 1:04d}.npy") for n in range(len(self.decoder.layers))]
        if any(peaks.shape != shape or not np.isfinite(peaks).all() for peaks in found):
            raise CheckpointError(f"{self.folder}: is damaged; delete it and calibrate again")
        scaled = [
            peaks / np.ldexp(np.float32(1), np.stack([s.keys, s.values]).astype(np.int32)).reshape(shape)
            for peaks, s in zip(found, self.scales, strict=True)
        ]
        return [np.maximum(peaks, np.float32(1e-6)) for peaks in scaled]  # a channel that is never used


def _some_rows(item: Item) -> list[tuple[int, int]]:
    """Two runs of 16 rows, or all of a small item."""
    if item.rows <= 32:
        return [(item.start, item.stop)]
    return [(start, start + 16) for start in (item.start, item.start + (item.rows - 16) * 2 // 3)]


def linears(decoder: Decoder) -> Iterator[Linear]:
    """All matrices, in the order of computation."""
    for layer in decoder.layers:
        yield from layer.linears()
    yield decoder.head


def calibrate(
    checkpoint: Checkpoint, described: Source, wanted: CalibrationText, progress: Progress = lambda _: None
) -> Calibration:
    """Calibrate a checkpoint, `described` as its bundles' manifests do; or find that it was done before.

    Raises the errors of `calibration_windows`, and PhiError where the outcome cannot be kept.
    """
    config = checkpoint.config
    length = min(WINDOW, config.max_position_embeddings)
    texts = calibration_windows(checkpoint, wanted.text, wanted.windows, length)
    said = {
        "version": _VERSION,
        "damping": DAMPING,
        "products": str(product_type()),
        "source": described.sha256,
        "windows": texts,
    }
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    folder = (wanted.cache or checkpoint.folder / "calibration") / digest[:16]
    with disk_full_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, lambda: progress("another run is calibrating this checkpoint; waiting for it")):
            if not (folder / _COSTS).is_file():
                _gather(checkpoint, texts, folder, progress)
                scaled = equalised(checkpoint, _scales(folder, config.decoder()))
                costs = measure_costs(scaled, texts, folder, progress)
                write_file(folder / _COSTS, json.dumps(costs, indent=1) + "\n")
                for state in (*folder.glob("after-*.npy"), *folder.glob("shown-*.npy")):
                    state.unlink()
    costs = read_json(folder / _COSTS)
    if not all(isinstance(v, float) for v in costs.values()):
        raise CheckpointError(f"{folder}: is damaged; delete it and calibrate again")
    name = wanted.text if wanted.text == BUILT_IN else Path(wanted.text).name
    scales = _scales(folder, config.decoder())
    return Calibration(folder, config.decoder(), CalibratedOn(name, sum(map(len, texts)), digest), costs, scales)


def _scales(folder: Path, decoder: Decoder) -> list[Scales]:
    parts = [load_array(folder / f"scales-{n + 1:04d}.npy") for n in range(len(decoder.layers))]
    try:
        return unpack(decoder, np.concatenate(parts))
    except ValueError:
        raise CheckpointError(f"{folder}: is damaged; delete it and calibrate again") from None


class _Moments:
    """Adds up the second moments of what enters each matrix, of these the upper triangle alone, and its squares."""

    def __init__(self) -> None:
        self._found: dict[str, tuple[Tensor, Tensor]] = {}

    def see(self, linear: Linear, x_BTC: Tensor) -> None:
        """Count activations that enter a matrix."""
        x = x_BTC.reshape(-1, x_BTC.shape[-1])
        squares = x.square().sum(dim=0)
        moment, sizes = self._found.setdefault(
            linear.weight[0], (torch.zeros(x.shape[1], x.shape[1]), torch.zeros(x.shape[1]))
        )
        sizes += squares
        x = x.to(product_type())
        for start, stop in _stripes(x.shape[1]):
            moment[start:stop, start:] += x[:, start:stop].T @ x[:, start:]

    def squares(self, linear: Linear, count: int) -> F32:
        """The mean squares of what enters a matrix, [columns]."""
        return np.asarray((self._found[linear.weight[0]][1] / count).numpy())

    def take(self, linear: Linear, count: int) -> F32:
        """The moment of what enters a matrix, per token; forgets it."""
        moment, squares = self._found.pop(linear.weight[0])
        for start, stop in _stripes(len(moment)):
            moment[stop:, start:stop] = moment[start:stop, stop:].T
        # Products of bfloat16 are rounded to it, which could leave a matrix that has no factor.
        moment.diagonal().copy_(squares * _ROUNDED)
        return np.asarray(moment.div_(count).numpy())


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
def _gather(checkpoint: Checkpoint, texts: list[list[int]], folder: Path, progress: Progress) -> None:
    """Keep the scales of each layer, the factors of all matrices under them, what enters each layer for the windows
    that costs are measured on, and what has become of all windows after the last layer done.
    """
    d = checkpoint.config.decoder()
    moments, cache = _Moments(), _Cache(d)
    model = TorchDecoder(d, checkpoint.read, len(texts[0]), product_type(), moments.see, cache.see)
    count = sum(map(len, texts))
    begun, state = _resume(folder, len(texts))
    x_BTE = model.embed(texts) if state is None else torch.from_numpy(state)
    at_a_time = max(1, BATCH // len(texts[0]))

    def keep(linear: Linear, scale: F32) -> None:
        moment = moments.take(linear, count)
        if not np.isfinite(moment).all():
            raise CheckpointError(f"{checkpoint.folder}: its activations grow beyond float32 on the calibration text")
        moment /= scale[:, None]
        moment /= scale
        save_factor(folder, linear.weight[0], factorise(moment))

    for n in range(begun, len(d.layers)):
        layer = d.layers[n]
        progress(f"layer {n + 1} of {len(d.layers)}: activations")
        save_array(shown_path(folder, n), shown(x_BTE, checkpoint).numpy())
        weights = model.weights(*layer.linears())
        for batch in torch.split(x_BTE, at_a_time):  # in place: what a layer makes of windows stands where they stood
            batch.copy_(model.layer(n, batch, weights))
        del weights
        peaks, keys = cache.take(count)
        scales = choose_scales(d, layer, {i: moments.squares(i, count) for i in layer.linears()}, keys)
        save_array(folder / f"kv-{n + 1:04d}.npy", peaks)
        save_array(folder / f"scales-{n + 1:04d}.npy", np.concatenate(scales.parts()))
        progress(f"layer {n + 1} of {len(d.layers)}: error feedback's factors")
        for linear, scale in input_scales(d, layer, scales).items():
            keep(linear, scale)
        save_array(folder / f"after-{n + 1:04d}.npy", x_BTE.numpy())
        (folder / f"after-{n:04d}.npy").unlink(missing_ok=True)
    progress("the head: activations")
    save_array(shown_path(folder, len(d.layers)), shown(x_BTE, checkpoint).numpy())
    for batch in torch.split(x_BTE, at_a_time):
        moments.see(d.head, model.norm(batch, d.final_norm))
    keep(d.head, np.ones(d.hidden_size, np.float32))


def _resume(folder: Path, windows: int) -> tuple[int, np.ndarray | None]:
    """The layers that an interrupted run had done, and the activations after them."""
    for path in sorted(folder.glob("after-*.npy"), reverse=True):
        state = load_array(path)
        if state.ndim == 3 and len(state) == windows:
            return int(path.stem.removeprefix("after-")), state
    return 0, None
