"""Read back an artifact's tensors and compare them with the checkpoint's, block by block."""

import math
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from phi_export.formats import TensorGroup, get_format, tensor_groups
from phi_export.verify.check import Check, Progress
from phi_runtime.architecture.checkpoint import Checkpoint
from phi_runtime.architecture.decoder import F32
from phi_runtime.backends import cores
from phi_runtime.backends.reference import ReadTensor
from phi_runtime.errors import BundleError
from phi_runtime.package.manifest import Manifest

_PIECE = 1 << 21  # weights compared at a time

# How far rounding may be off, in units of what the type does to normally distributed weights. Worse
# distributions cost a few times that; two tensors mixed up give an error of about 2, a lost scale 1.
_TENSOR_MARGIN, _BLOCK_MARGIN = 4.5, 22
_MAX_ERROR = 0.95
# Error feedback moves weights further than rounding does, where outputs do not see it, and a block takes the errors of
# others too. But that is noise: little of it lies along the weights (a quarter of a block's energy, at most, in four
# bits; coarse types shrink weights by their own error), where what is lost or foreign is off by all of it. Beside a
# block of nothing stands a tenth of its row's mean.
_MAX_ALONG, _MAX_ALONG_ALL, _OTHERS = 0.6, 0.2, 0.1
MAX_VECTOR_ERROR = 1e-6
_MAX_HALF_ERROR = 1e-3  # of vectors that are stored in float16


def check_weights(read: ReadTensor, manifest: Manifest, checkpoint: Checkpoint, progress: Progress) -> list[Check]:
    """Every stored tensor against the checkpoint's, a piece at a time; one check for blocks, tensors and vectors each.

    Errors are in units of their limits, which depend on the type.
    """
    options = manifest.options
    kinds = get_format(manifest.format).types(options)
    worst = {"block": (0.0, ""), "tensor": (0.0, ""), "vector": (0.0, "")}
    with ThreadPoolExecutor(cores()) as pool:
        for item in tensor_groups(checkpoint.config, options):
            progress(item.name)
            step = max(1, _PIECE // item.columns)
            quant = manifest.quantization[item.name]
            if item.role == "vector":
                error = _vector_error(read(item.tensor), checkpoint.read(item.tensor))
                limit = MAX_VECTOR_ERROR if quant.type == "float32" else _MAX_HALF_ERROR
                worst["vector"] = max(worst["vector"], (_nan_is_worst(error / limit), item.name))
                continue
            fed_back = manifest.calibration is not None
            expected = kinds[quant.type].error
            # Where whole rows share a table, a part of them that is small beside the rest may be lost.
            block, floor = (quant.block, 1e-6) if quant.block > 1 else (item.columns, 1.0)

            def compare(
                start: int, item: TensorGroup = item, step: int = step, block: int = block
            ) -> tuple[np.ndarray, F32]:
                stop = min(item.stop, start + step)
                stored_rows, original = read(item.tensor, start, stop), checkpoint.read(item.tensor, start, stop)
                if stored_rows.shape != original.shape:
                    raise BundleError(f"{item.tensor} has rows of another shape than the checkpoint's")
                moved, shape = stored_rows - original, (len(original), -1, block)
                error, energy = (np.square(x).reshape(shape).sum(axis=2) for x in (moved, original))
                along = np.abs((moved * original).reshape(shape).sum(axis=2))
                beside = energy + _OTHERS * energy.mean(axis=1, keepdims=True)
                sums = np.array([error.sum(dtype=np.float64), (moved * original).sum(dtype=np.float64)])
                return sums, np.stack([error, energy, along / (beside + 1e-30)]).reshape(3, -1)

            parts = list(pool.map(compare, range(item.start, item.stop, step)))
            error, energy, along = np.concatenate([p[1] for p in parts], axis=1).astype(np.float64)
            if fed_back:
                errors, block_limit = along, _MAX_ALONG
            else:  # blocks of next to nothing count for nothing
                errors = error / (energy + floor * energy.mean() + 1e-30)
                block_limit = min(_MAX_ERROR, max(_BLOCK_MARGIN * expected, 2e-3))
            figure = _nan_is_worst(float(errors.max()) / block_limit)
            worst["block"] = max(worst["block"], (figure, f"{item.name}, block {errors.argmax()}"))
            whole, along_all = np.sum([p[0] for p in parts], axis=0) / max(float(energy.sum()), 1e-30)
            figure = whole / min(_MAX_ERROR, max(_TENSOR_MARGIN * expected, 2e-4))
            if fed_back:
                figure = max(whole / (1 + 10 * expected), abs(along_all) / (_MAX_ALONG_ALL + 1.5 * expected))
            worst["tensor"] = max(worst["tensor"], (_nan_is_worst(figure), item.name))
    return [
        Check("weights", value, 1.0, f"error of the worst {kind} as a share of what its type allows, {where}")
        for kind, (value, where) in worst.items()
    ]


def _vector_error(stored_vector: F32, original: F32) -> float:
    if stored_vector.shape != original.shape:
        return math.inf
    return float(np.abs(stored_vector - original).max() / max(float(np.abs(original).max()), 1e-30))


def _nan_is_worst(value: float) -> float:
    return float("inf") if np.isnan(value) else float(value)
