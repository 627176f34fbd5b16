"""Calibrate a checkpoint on a text, once for all formats and budgets.

Two passes, each a layer at a time. The forward pass gathers the Hessian of every matrix's inputs and keeps its factor
for GPTQ (`cache`); it resumes at the layer where it stopped. The backward pass finds the sensitivity of every matrix
and writes `sensitivity.json`, with which a calibration is complete.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np

from phi_export.calibrate.cache import load_array, load_factor
from phi_export.calibrate.equalise import Scales, equalised, input_scales, unpack
from phi_export.calibrate.text import calibration_windows
from phi_export.defaults import BUILT_IN, WINDOW, WINDOWS
from phi_export.formats import Format, TensorGroup, Type
from phi_export.quantize.gptq import DAMPING, HessianFactor
from phi_export.quantize.uniform import finite
from phi_runtime.architecture.checkpoint import Checkpoint
from phi_runtime.architecture.config import read_json
from phi_runtime.architecture.decoder import F32, Decoder, Linear
from phi_runtime.errors import CheckpointError
from phi_runtime.files import disk_full_named, locked, write_file
from phi_runtime.package.manifest import CalibratedOn, ExportOptions, Source
from phi_train.allocator import freed_memory_kept

_VERSION = 8
_SENSITIVITY = "sensitivity.json"

Progress = Callable[[str], None]


@dataclass(frozen=True)
class CalibrationText:
    """What to calibrate on: `text` as `calibration_windows` has it, how many windows of WINDOW tokens of it, and where
    to keep the outcome (by default in the checkpoint's folder).
    """

    text: str = BUILT_IN
    windows: int = WINDOWS
    cache: Path | None = None


@dataclass(frozen=True)
class Calibration:
    """The outcome, on disk. `sensitivity`: nats of KL divergence, per item, of an error of one (relative, squared) as
    GPTQ leaves it behind; items are named as with `split_qkv`. Factors and sensitivity are of the model under `scales`
    (`equalise.equalised`), one for each layer.
    """

    folder: Path
    decoder: Decoder
    on: CalibratedOn
    sensitivity: dict[str, float]
    scales: list[Scales] = field(compare=False)
    scaled: bool = True

    def unscaled(self) -> "Calibration":
        """The same of the model as it is, for a format that does not equalise; its sensitivity is taken to be alike."""
        return replace(self, scaled=False)

    def sensitivity_of(self, item: TensorGroup) -> float:
        """Of an item, or of its parts together."""
        if item.name in self.sensitivity:
            return self.sensitivity[item.name]
        return sum(c for name, c in self.sensitivity.items() if name.startswith(f"{item.name}:"))

    def losses(
        self, module: Format, checkpoint: Checkpoint, options: ExportOptions
    ) -> Callable[[TensorGroup, Type], float]:
        """The KL divergence, nats per token, to expect of storing an item as a type: its cost, times the error of the
        type on some of its rows, times what feedback makes of that.
        """

        @cache
        def loss(item: TensorGroup, name: str, fed: float) -> float:
            rows = np.concatenate([finite(checkpoint.tensors[item.tensor], a, b) for a, b in _some_rows(item)])
            error = float(np.square(module.rounded(rows, name, options) - rows).sum())
            return self.sensitivity_of(item) * fed * error / max(float(np.square(rows).sum()), 1e-30)

        def of(item: TensorGroup, kind: Type) -> float:
            alone = item.role == "embedding" and not self.decoder.tied
            return loss(item, kind.name, 1.0 if alone else kind.fed_back / kind.error)

        return of

    def factor(self, tensor: str) -> HessianFactor | None:
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


def _some_rows(item: TensorGroup) -> list[tuple[int, int]]:
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
    # PyTorch takes a second to import; what is refused before should not take that.
    from phi_export.calibrate.hessian import gather
    from phi_export.calibrate.sensitivity import measure_sensitivity
    from phi_train.models.precision import product_type

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
    folder = (wanted.cache or (checkpoint.home or checkpoint.folder) / "calibration") / digest[:16]
    with disk_full_named(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with locked(folder, lambda: progress("another run is calibrating this checkpoint; waiting for it")):
            if not (folder / _SENSITIVITY).is_file():
                with freed_memory_kept():
                    gather(checkpoint, texts, folder, progress)
                    scaled = equalised(checkpoint, _scales(folder, config.decoder()))
                    sensitivity = measure_sensitivity(scaled, texts, folder, progress)
                write_file(folder / _SENSITIVITY, json.dumps(sensitivity, indent=1) + "\n")
                for state in (*folder.glob("after-*.npy"), *folder.glob("layer-input-*.npy")):
                    state.unlink()
    sensitivity = read_json(folder / _SENSITIVITY)
    if not all(isinstance(v, float) for v in sensitivity.values()):
        raise CheckpointError(f"{folder}: is damaged; delete it and calibrate again")
    name = wanted.text if wanted.text == BUILT_IN else Path(wanted.text).name
    scales = _scales(folder, config.decoder())
    return Calibration(folder, config.decoder(), CalibratedOn(name, sum(map(len, texts)), digest), sensitivity, scales)


def _scales(folder: Path, decoder: Decoder) -> list[Scales]:
    parts = [load_array(folder / f"scales-{n + 1:04d}.npy") for n in range(len(decoder.layers))]
    try:
        return unpack(decoder, np.concatenate(parts))
    except ValueError:
        raise CheckpointError(f"{folder}: is damaged; delete it and calibrate again") from None
