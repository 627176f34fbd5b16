"""What an error of each matrix costs at the end, in KL divergence.

A text goes through the checkpoint a layer at a time. At each matrix copies of its activations branch off that see the
matrix with an error as feedback leaves it behind; all go on to the end, where their predictions are compared.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from phi_export.compare import Agreement
from phi_export.feedback import Factor
from phi_export.formats import Item, Options, items
from phi_export.kept import load_factor
from phi_export.verify import LARGE
from phi_runtime.backends.reference import Lane, Reference
from phi_runtime.checkpoint import Checkpoint
from phi_runtime.config import num_parameters
from phi_runtime.decoder import F32, Decoder, Linear

NOISE = 0.02  # relative error under which costs are measured; they grow in proportion to it
BATCH = 4096  # tokens taken through a layer at a time; bounds the memory
_ROWS = 1 << 23  # weights whose error is drawn at a time
# Windows that costs are measured on, and tokens of each; of a large model one short one, for the sake of time.
_SHOWN, _SHOWN_LARGE = (4, 512), (1, 128)

# An item, and the lanes that see its error.
_Spoilt = tuple[Item, list[Lane]]


def measure_costs(
    checkpoint: Checkpoint, texts: list[list[int]], folder: Path, progress: Callable[[str], None]
) -> dict[str, float]:
    """Of each item (as with `split_qkv`): nats of KL divergence per unit of relative squared error.

    `folder` holds the factors of all matrices.
    """
    decoder = checkpoint.config.decoder()
    count, length = _SHOWN_LARGE if num_parameters(checkpoint.config) >= LARGE else _SHOWN
    shown = [text[:length] for text in texts[:: max(1, len(texts) // count)][:count]]
    found = [i for i in items(checkpoint.config, Options(split_qkv=True)) if i.role != "vector"]
    spoiler = _Spoiler(checkpoint, folder)
    base = spoiler.lanes = new_lanes(decoder, len(shown))
    spoiler.embed(shown)
    going = {i.name: _spoilt_rows(base, shown, i, decoder) for i in found if i.role == "embedding"}
    for n, layer in enumerate(decoder.layers):
        progress(f"layer {n + 1} of {len(decoder.layers)}: what an error costs")
        for batch in batches([lane for lanes in going.values() for lane in lanes]):
            spoiler.take(n, batch)
        held = {name for linear in layer.linears() for name in linear.weight}
        here = [(i, _branch(base, decoder)) for i in found if i.tensor in held]
        spoiler.take(n, base, here)
        going |= {i.name: lanes for i, lanes in here}
    progress("what the errors cost at the end")
    exact = spoiler.predict(base)
    costs = {}
    for item in found:
        lanes = going.get(item.name, base)
        logits = spoiler.predict(lanes, item if item.tensor in decoder.head.weight else None)
        outcome = Agreement()
        for text, p, q in zip(shown, exact, logits, strict=True):
            outcome.add(p, q, text[1:])
        costs[item.name] = outcome.kld_mean / NOISE
    return costs


class _Spoiler(Reference):
    """Adds to the outputs of matrices what an error of their weights would."""

    def __init__(self, checkpoint: Checkpoint, folder: Path) -> None:
        super().__init__(checkpoint.config.decoder(), checkpoint.read, 0)
        self._folder, self._checkpoint = folder, checkpoint
        self._spoilt: dict[str, list[tuple[Item, range]]] = {}  # by tensor: items, and which lanes see their error

    def take(self, n: int, lanes: list[Lane], spoilt: Sequence[_Spoilt] = ()) -> None:
        """Take lanes through a layer, and with them those that see an item's error."""
        self.lanes = list(lanes)
        for item, own in spoilt:
            seen_by = range(len(self.lanes), len(self.lanes) + len(own))
            self._spoilt.setdefault(item.tensor, []).append((item, seen_by))
            self.lanes += own
        self.layer(n)
        self._spoilt = {}

    def predict(self, lanes: list[Lane], spoilt: Item | None = None) -> list[F32]:
        """Logits of lanes, with an error of the head if it is `spoilt`."""
        self.lanes = lanes
        if spoilt is not None:
            self._spoilt = {spoilt.tensor: [(spoilt, range(len(lanes)))]}
        logits = self.logits([lane.x_TE for lane in lanes])
        self._spoilt = {}
        return logits

    def linear(self, xs: list[F32], linear: Linear) -> list[F32]:
        ys = super().linear(xs, linear)
        at = 0
        for tensor in linear.weight:
            for item, seen_by in self._spoilt.get(tensor, []):
                for start, error in self._errors(item, load_factor(self._folder, linear.weight[0])):
                    rows = slice(at + start, at + start + len(error))
                    for lane in seen_by:
                        ys[lane][:, rows] += xs[lane] @ error.T
            at += self._checkpoint.tensors[tensor].shape[0]
        return ys

    def _errors(self, item: Item, factor: Factor) -> Iterator[tuple[int, F32]]:
        """An item's error, some rows at a time."""
        random = np.random.default_rng(list(item.name.encode()))
        step = max(1, _ROWS // item.columns)
        for start in range(item.start, item.stop, step):
            weights = self._checkpoint.read(item.tensor, start, min(item.stop, start + step))
            yield start, factor.noise(len(weights), NOISE, weights, random)


def new_lanes(decoder: Decoder, count: int) -> list[Lane]:
    """Lanes of exact arithmetic, without caches."""
    return [Lane(decoder, 0, lambda x: x) for _ in range(count)]


def batches(lanes: list[Lane]) -> Iterator[list[Lane]]:
    """As many lanes at a time as BATCH allows."""
    size = max(1, BATCH // len(lanes[0].x_TE)) if lanes else 1
    for start in range(0, len(lanes), size):
        yield lanes[start : start + size]


def _branch(base: list[Lane], decoder: Decoder) -> list[Lane]:
    lanes = new_lanes(decoder, len(base))
    for copy, lane in zip(lanes, base, strict=True):
        copy.x_TE = lane.x_TE
    return lanes


def _spoilt_rows(base: list[Lane], texts: list[list[int]], item: Item, decoder: Decoder) -> list[Lane]:
    """Lanes whose tokens were looked up in an embedding with an error."""
    lanes, random = _branch(base, decoder), np.random.default_rng(list(item.name.encode()))
    for lane, text in zip(lanes, texts, strict=True):
        tokens, which = np.unique(text, return_inverse=True)
        error = random.standard_normal((len(tokens), item.columns), dtype=np.float32)
        lane.x_TE = lane.x_TE + error[which] * np.sqrt(NOISE * np.square(lane.x_TE).mean(axis=1, keepdims=True))
    return lanes
