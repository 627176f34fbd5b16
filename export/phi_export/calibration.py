"""What a model does on real text, gathered once for all formats and plans.

Two passes, each a layer at a time. The first gathers the second moment of every matrix's inputs and keeps
what error feedback needs of it (`kept`); it goes on where it was interrupted. The second measures what an error of each
matrix costs at the end (`costs`) and writes `costs.json`, with which a calibration is complete.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np

from phi_export.calibration_text import BUILT_IN, calibration_windows
from phi_export.costs import NOISE, batches, measure_costs, new_lanes
from phi_export.feedback import DAMPING, Factor, factorise
from phi_export.formats import Format, Item, Options, Type
from phi_export.kept import load_array, load_factor, save_array, save_factor
from phi_export.quantize import finite
from phi_runtime.backends.reference import Reference, split_heads
from phi_runtime.bundle import CalibratedOn, Source
from phi_runtime.checkpoint import Checkpoint
from phi_runtime.config import read_json
from phi_runtime.decoder import F32, Decoder, Linear
from phi_runtime.errors import CheckpointError
from phi_runtime.files import disk_full_named, write_file

WINDOW = 512
_VERSION = 2
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
    feedback leaves it behind; items are named as with `split_qkv`.
    """

    folder: Path
    decoder: Decoder
    on: CalibratedOn
    costs: dict[str, float]

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
                return load_factor(self.folder, linear.weight[0])
        return None

    def kv_peaks(self) -> list[F32]:
        """Per layer, of keys and values: the largest magnitudes of the text, [2, kv_heads, head_dim]."""
        shape = (2, self.decoder.kv_heads, self.decoder.head_dim)
        found = [load_array(self.folder / f"kv-{n + 1:04d}.npy") for n in range(len(self.decoder.layers))]
        if any(peaks.shape != shape or not np.isfinite(peaks).all() for peaks in found):
            raise CheckpointError(f"{self.folder}: is damaged; delete it and calibrate again")
        return [np.maximum(peaks, np.float32(1e-6)) for peaks in found]  # a channel that is never used


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
        "noise": NOISE,
        "source": described.sha256,
        "windows": texts,
    }
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    folder = (wanted.cache or checkpoint.folder / "calibration") / digest[:16]
    with disk_full_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _COSTS).is_file():
            _gather(checkpoint, texts, folder, progress)
            costs = measure_costs(checkpoint, texts, folder, progress)
            write_file(folder / _COSTS, json.dumps(costs, indent=1) + "\n")
            for state in folder.glob("after-*.npy"):
                state.unlink()
    costs = read_json(folder / _COSTS)
    if not all(isinstance(v, float) for v in costs.values()):
        raise CheckpointError(f"{folder}: is damaged; delete it and calibrate again")
    name = wanted.text if wanted.text == BUILT_IN else Path(wanted.text).name
    return Calibration(folder, config.decoder(), CalibratedOn(name, sum(map(len, texts)), digest), costs)


class _Gatherer(Reference):
    """Adds up the second moments of what enters each matrix."""

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        super().__init__(checkpoint.config.decoder(), checkpoint.read, 0)
        self._name, self._folder = checkpoint.folder, folder
        self._moments: dict[str, F32] = {}
        self._qkv = {layer.qkv for layer in self.decoder.layers}
        self._peaks: F32 | None = None

    def linear(self, xs: list[F32], linear: Linear) -> list[F32]:
        self.see(xs, linear)
        out = super().linear(xs, linear)
        if linear in self._qkv:
            for y in out:
                peaks = kv_peaks(self.decoder, y)
                self._peaks = peaks if self._peaks is None else np.maximum(self._peaks, peaks)
        return out

    def see(self, xs: list[F32], linear: Linear) -> None:
        """Count activations that enter a matrix."""
        width = xs[0].shape[1]
        moment = self._moments.setdefault(linear.weight[0], np.zeros((width, width), np.float32))
        together = np.concatenate(xs)  # one product: each costs a pass over the whole moment
        moment += together.T @ together

    def keep_peaks(self, layer: int) -> None:
        """Keep the largest magnitudes of a layer's keys and values."""
        assert self._peaks is not None
        save_array(self._folder / f"kv-{layer:04d}.npy", self._peaks)
        self._peaks = None

    def keep(self, count: int) -> None:
        """Keep the factors of what `count` tokens were seen of, and forget their moments. Raises CheckpointError."""
        while self._moments:
            name, moment = self._moments.popitem()
            if not np.isfinite(moment).all():
                raise CheckpointError(f"{self._name}: its activations grow beyond float32 on the calibration text")
            save_factor(self._folder, name, factorise(moment / np.float32(count)))


def kv_peaks(d: Decoder, qkv: F32) -> F32:
    """The largest magnitudes of keys, wherever they may be rotated to, and values, [2, kv_heads, head_dim]."""
    _, k_GTD, v_GTD = split_heads(d, qkv)
    if d.rope is not None:  # a rotated pair keeps its length
        half = d.rope.dims // 2
        lengths = np.hypot(k_GTD[..., :half], k_GTD[..., half : 2 * half]) * np.float32(d.rope.attention_factor)
        k_GTD = np.concatenate([lengths, lengths, k_GTD[..., 2 * half :]], axis=-1)
    return np.stack([np.abs(k_GTD).max(axis=1), np.abs(v_GTD).max(axis=1)])


def _gather(checkpoint: Checkpoint, texts: list[list[int]], folder: Path, progress: Progress) -> None:
    """Keep the factors of all matrices, and what has become of the texts after the last layer done."""
    decoder = checkpoint.config.decoder()
    gatherer, lanes = _Gatherer(checkpoint, folder), new_lanes(decoder, len(texts))
    count = sum(map(len, texts))
    begun, state = _resume(folder, len(texts))
    if state is None:
        gatherer.lanes = lanes
        gatherer.embed(texts)
    else:
        for lane, x_TE in zip(lanes, state, strict=True):
            lane.x_TE = x_TE
    for n in range(begun, len(decoder.layers)):
        progress(f"layer {n + 1} of {len(decoder.layers)}: activations")
        for gatherer.lanes in batches(lanes):
            gatherer.layer(n)
        progress(f"layer {n + 1} of {len(decoder.layers)}: factors")
        gatherer.keep(count)
        gatherer.keep_peaks(n + 1)
        save_array(folder / f"after-{n + 1:04d}.npy", np.stack([lane.x_TE for lane in lanes]))
        (folder / f"after-{n:04d}.npy").unlink(missing_ok=True)
    progress("the head's factor")
    for batch in batches(lanes):
        gatherer.see(gatherer.norm([lane.x_TE for lane in batch], decoder.final_norm), decoder.head)
    gatherer.keep(count)


def _resume(folder: Path, windows: int) -> tuple[int, np.ndarray | None]:
    """The layers that an interrupted run had done, and the activations after them."""
    for path in sorted(folder.glob("after-*.npy"), reverse=True):
        state = load_array(path)
        if state.ndim == 3 and len(state) == windows:
            return int(path.stem.removeprefix("after-")), state
    return 0, None
