"""What a model does on real text, gathered once for all formats and plans.

Two passes, each a layer at a time. The first gathers the second moment of every matrix's inputs and keeps
what error feedback needs of it; it goes on where it was interrupted. The second measures what an error of each matrix
costs at the end: a copy of the text's activations goes on from each, and its predictions are compared.

The cache: per input NAME-order.npy and NAME-spread.npy (the factor's triangle, row after row, in float16),
`sensitivity.json`, `calibration.json`.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

from phi_export.calibration_text import BUILT_IN, calibration_windows
from phi_export.compare import Agreement
from phi_export.feedback import DAMPING, Factor, factorise
from phi_export.formats import Format, Item, Options, Type, items
from phi_export.quantize import finite
from phi_export.verify import LARGE
from phi_runtime.backends.reference import Lane, ReadTensor, Reference
from phi_runtime.bundle import CalibratedOn, Source
from phi_runtime.checkpoint import Checkpoint
from phi_runtime.config import num_parameters, read_json
from phi_runtime.decoder import F32, Decoder, Linear
from phi_runtime.errors import CheckpointError, PhiError
from phi_runtime.files import disk_full_named, write_file

WINDOW = 512
_BATCH = 4096  # tokens taken through a layer at a time; bounds the memory
_NOISE = 0.02  # relative error under which costs are measured; they grow in proportion to it
_ROWS = 1 << 23  # weights whose error is drawn at a time
_VERSION = 1

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
                return _load_factor(self.folder, linear.weight[0])
        return None


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
        "noise": _NOISE,
        "source": described.sha256,
        "windows": texts,
    }
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()
    folder = (wanted.cache or checkpoint.folder / "calibration") / digest[:16]
    with disk_full_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / "sensitivity.json").is_file():
            _gather(checkpoint, texts, folder, progress)
            costs = _measure(checkpoint, texts, folder, progress)
            write_file(folder / "sensitivity.json", json.dumps(costs, indent=1) + "\n")
    costs = read_json(folder / "sensitivity.json")
    if not all(isinstance(v, float) for v in costs.values()):
        raise CheckpointError(f"{folder}: is damaged; delete it and calibrate again")
    name = wanted.text if wanted.text == BUILT_IN else Path(wanted.text).name
    return Calibration(folder, config.decoder(), CalibratedOn(name, sum(map(len, texts)), digest), costs)


class _Gatherer(Reference):
    """Adds up the second moments of what enters each matrix."""

    def __init__(self, decoder: Decoder, read: ReadTensor) -> None:
        super().__init__(decoder, read, 0)
        self.moments: dict[str, F32] = {}

    def linear(self, xs: list[F32], linear: Linear) -> list[F32]:
        self.see(xs, linear)
        return super().linear(xs, linear)

    def see(self, xs: list[F32], linear: Linear) -> None:
        """Count activations that enter a matrix."""
        width = xs[0].shape[1]
        moment = self.moments.setdefault(linear.weight[0], np.zeros((width, width), np.float32))
        together = np.concatenate(xs)  # one product: each costs a pass over the whole moment
        moment += together.T @ together


def _gather(checkpoint: Checkpoint, texts: list[list[int]], folder: Path, progress: Progress) -> None:
    decoder = checkpoint.config.decoder()
    gatherer = _Gatherer(decoder, checkpoint.read)
    count = np.float32(sum(map(len, texts)))
    lanes = [Lane(decoder, 0, lambda x: x) for _ in texts]
    begun, state = _resume(folder, len(texts))
    if state is None:
        gatherer.lanes = lanes
        gatherer.embed(texts)
    else:
        for lane, x_TE in zip(lanes, state, strict=True):
            lane.x_TE = x_TE
    for n in range(begun, len(decoder.layers)):
        progress(f"layer {n + 1} of {len(decoder.layers)}: activations")
        for batch in _batches(lanes):
            gatherer.lanes = batch
            gatherer.layer(n)
        progress(f"layer {n + 1} of {len(decoder.layers)}: factors")
        for name in list(gatherer.moments):
            _save_factor(folder, name, factorise(_finite(gatherer.moments.pop(name), checkpoint) / count))
        _save(folder / f"after-{n + 1:04d}.npy", np.stack([lane.x_TE for lane in lanes]))
        (folder / f"after-{n:04d}.npy").unlink(missing_ok=True)
    progress("the head's factor")
    gatherer.lanes = lanes
    for batch in _batches(lanes):
        gatherer.see(gatherer.norm([lane.x_TE for lane in batch], decoder.final_norm), decoder.head)
    _save_factor(
        folder,
        decoder.head.weight[0],
        factorise(_finite(gatherer.moments.pop(decoder.head.weight[0]), checkpoint) / count),
    )
    (folder / f"after-{len(decoder.layers):04d}.npy").unlink(missing_ok=True)


def _finite(moment: F32, checkpoint: Checkpoint) -> F32:
    if not np.isfinite(moment).all():
        raise CheckpointError(f"{checkpoint.folder}: its activations grow beyond float32 on the calibration text")
    return moment


def _resume(folder: Path, windows: int) -> tuple[int, np.ndarray | None]:
    """The layers that an interrupted run had done, and the activations after them."""
    for path in sorted(folder.glob("after-*.npy"), reverse=True):
        state = _load(path)
        if state.ndim == 3 and len(state) == windows:
            return int(path.stem.removeprefix("after-")), state
    return 0, None


def _batches(lanes: list[Lane]) -> Iterator[list[Lane]]:
    size = max(1, _BATCH // len(lanes[0].x_TE))
    for start in range(0, len(lanes), size):
        yield lanes[start : start + size]


class _Spoiler(Reference):
    """Adds to the outputs of matrices what an error of their weights would."""

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        super().__init__(checkpoint.config.decoder(), checkpoint.read, 0)
        self.spoilt: dict[
            str, list[tuple[Item, list[int]]]
        ] = {}  # by tensor: items, and the lanes that see their error
        self._folder, self._tensors = folder, checkpoint.tensors

    def linear(self, xs: list[F32], linear: Linear) -> list[F32]:
        ys = super().linear(xs, linear)
        factor = None
        at = 0
        for tensor in linear.weight:
            for item, seen_by in self.spoilt.get(tensor, []):
                factor = factor or _load_factor(self._folder, linear.weight[0])
                for start, error in self._errors(item, factor):
                    rows = slice(at + start, at + start + len(error))
                    for lane in seen_by:
                        ys[lane][:, rows] += xs[lane] @ error.T
            at += self._tensors[tensor].shape[0]
        return ys

    def _errors(self, item: Item, factor: Factor) -> Iterator[tuple[int, F32]]:
        random = np.random.default_rng(list(item.name.encode()))
        step = max(1, _ROWS // item.columns)
        for start in range(item.start, item.stop, step):
            weights = self._read(item.tensor, start, min(item.stop, start + step))
            yield start, factor.noise(len(weights), _NOISE, weights, random)


def _measure(checkpoint: Checkpoint, texts: list[list[int]], folder: Path, progress: Progress) -> dict[str, float]:
    """Cost of each item: the KL divergence that its error brings, per unit of relative error."""
    decoder = checkpoint.config.decoder()
    large = num_parameters(checkpoint.config) >= LARGE
    shown = [text[: 128 if large else WINDOW] for text in texts[:: max(1, len(texts) // 4)][: 1 if large else 4]]
    W = len(shown)
    found = [i for i in items(checkpoint.config, Options(split_qkv=True)) if i.role != "vector"]
    spoiler = _Spoiler(checkpoint, folder)

    def lanes_from(base: list[Lane]) -> list[Lane]:
        copies = [Lane(decoder, 0, lambda x: x) for _ in base]
        for copy, lane in zip(copies, base, strict=True):
            copy.x_TE = lane.x_TE
        return copies

    base = spoiler.lanes = [Lane(decoder, 0, lambda x: x) for _ in shown]
    spoiler.embed(shown)
    spoilt: dict[str, list[Lane]] = {}
    for item in found:
        if item.role == "embedding":
            spoilt[item.name] = lanes_from(base)
            random = np.random.default_rng(0)
            for lane, text in zip(spoilt[item.name], shown, strict=True):
                rows, which = np.unique(text, return_inverse=True)
                error = random.standard_normal((len(rows), item.columns), dtype=np.float32)
                size = np.sqrt(_NOISE * np.square(lane.x_TE).mean(axis=1, keepdims=True))
                lane.x_TE = lane.x_TE + error[which] * size
    for n, layer in enumerate(decoder.layers):
        progress(f"layer {n + 1} of {len(decoder.layers)}: what an error costs")
        mine = [i for i in found if any(i.tensor in linear.weight for linear in layer.linears())]
        spoiler.lanes = [*base]
        spoiler.spoilt = {}
        for item in mine:
            seen_by = list(range(len(spoiler.lanes), len(spoiler.lanes) + W))
            spoiler.spoilt.setdefault(item.tensor, []).append((item, seen_by))
            new = lanes_from(base)
            spoiler.lanes += new
        fresh = spoiler.lanes
        for batch in _batches([lane for lanes in spoilt.values() for lane in lanes]) if spoilt else ():
            spoiler.spoilt, kept = {}, spoiler.spoilt
            spoiler.lanes = batch
            spoiler.layer(n)
            spoiler.spoilt = kept
        spoiler.lanes = fresh
        spoiler.layer(n)
        for k, item in enumerate(mine):
            spoilt[item.name] = fresh[W * (k + 1) : W * (k + 2)]
    progress("what the errors cost at the end")
    spoiler.spoilt = {}
    spoiler.lanes = base
    exact = spoiler.logits([lane.x_TE for lane in base])
    costs = {}
    for item in found:
        if item.tensor in decoder.head.weight:
            spoiler.spoilt = {item.tensor: [(item, list(range(W)))]}
            spoilt.setdefault(item.name, base)
        spoiler.lanes = spoilt[item.name]
        outcome = Agreement()
        logits = spoiler.logits([lane.x_TE for lane in spoiler.lanes])
        for text, p, q in zip(shown, exact, logits, strict=True):
            outcome.add(p, q, text[1:])
        costs[item.name] = outcome.kld_mean / _NOISE
        spoiler.spoilt = {}
    return costs


def _save_factor(folder: Path, name: str, factor: Factor) -> None:
    n = len(factor.order)
    triangle = np.empty(n * (n + 1) // 2, np.float16)
    at = 0
    for j in range(n):
        triangle[at : at + n - j] = factor.spread[j, j:]
        at += n - j
    _save(folder / f"{name}-spread.npy", triangle)
    _save(folder / f"{name}-order.npy", factor.order)


@lru_cache(maxsize=1)  # parts of a matrix share it, and two of the widest are much memory
def _load_factor(folder: Path, name: str) -> Factor:
    order, triangle = _load(folder / f"{name}-order.npy"), _load(folder / f"{name}-spread.npy")
    n = len(order)
    if triangle.shape != (n * (n + 1) // 2,) or not np.array_equal(np.sort(order), np.arange(n)):
        raise CheckpointError(f"{folder}: {name} is damaged; delete the folder and calibrate again")
    spread = np.zeros((n, n), np.float32)
    at = 0
    for j in range(n):
        spread[j, j:] = triangle[at : at + n - j]
        at += n - j
    return Factor(order, spread)


def _save(path: Path, array: np.ndarray) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as f:
        np.save(f, array, allow_pickle=False)
    partial.replace(path)


def _load(path: Path) -> np.ndarray:
    try:
        return np.load(path, allow_pickle=False)  # type: ignore[no-any-return]
    except (OSError, ValueError, EOFError):
        raise PhiError(f"{path}: is damaged; delete its folder and calibrate again") from None
