"""Round weights onto uniform grids and palettes, some rows at a time.

Grid: value = scale * code, signed codes of `bits` bits, one float16 scale per block of weights along
a row. That is MatMulNBits' symmetric grid and Core ML's per-block int4 alike. Affine grid: value = scale *
(code - zero), each block with a zero point of its own (MatMulNBits). Palette: value = table[code], one float16
table per group of rows (Core ML). GGUF's grids are ggml's own (`ggml`).
"""

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from phi_export.quantize.gptq import HessianFactor, Level, palette, round_columns, uniform, values_at_rounding
from phi_runtime.architecture.checkpoint import Tensor
from phi_runtime.architecture.decoder import F32
from phi_runtime.errors import CheckpointError
from phi_train.grid import SHRINK

U8 = npt.NDArray[np.uint8]
I8 = npt.NDArray[np.int8]
F16 = npt.NDArray[np.float16]

FLOAT16_MAX = 65504.0
_CACHED = 1 << 16  # weights worked on at a time, so that every step stays in the cache
_BINS = 2048  # of the histogram that palettes are fitted to
_ROUNDS = 12  # of Lloyd's algorithm
# Of a block's range, tried as the grid's, by bits.
_AFFINE_SHRINK = {
    2: (1.0, 0.9, 0.8, 0.7, 0.62, 0.55, 0.48),
    3: (1.0, 0.94, 0.88, 0.82, 0.76, 0.7, 0.64),
    4: (1.04, 1.0, 0.96, 0.92, 0.88, 0.84, 0.8, 0.76),
    5: (1.02, 1.0, 0.97, 0.94, 0.9, 0.86),
    6: (1.01, 1.0, 0.98, 0.96, 0.93),
    8: (1.0, 0.99),
}


def finite(tensor: Tensor, start: int = 0, stop: int | None = None) -> F32:
    """Rows of a tensor, refused where a value cannot be carried in float16.

    Raises CheckpointError.
    """
    piece = tensor.read(start, stop)
    largest = max(float(piece.max(initial=0.0)), -float(piece.min(initial=0.0)))
    if not largest <= FLOAT16_MAX:  # also false for NaN
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name} holds {'a NaN' if np.isnan(largest) else f'the value {largest:g}'}, "
            "which float16 cannot carry; mend the checkpoint before exporting it"
        )
    return piece


def round_rows(x: F32, bits: int, block: int, factor: HessianFactor | None = None) -> tuple[I8, F16]:
    """Codes [rows, columns] and scales [rows, columns / block] of finite rows, with error feedback given a factor."""
    importance = None if factor is None else factor.importance
    codes, scales = grid_rows(x, bits, block, importance)
    if factor is None:
        return codes, scales
    half = 1 << bits - 1

    def level(scales: F16) -> Level:
        return uniform(scales.astype(np.float32), block, bits, half)

    if bits == 2:  # so coarse a grid has to reach what errors have grown to; finer ones gain nothing by it
        scales = grid_rows(values_at_rounding(x, factor, level(scales)), bits, block, importance)[1]
    fed_back = round_columns(x, factor, level(scales)).view(np.int8)
    return fed_back - np.int8(half - 256 if half == 128 else half), scales


def grid_rows(x: F32, bits: int, block: int, importance: F32 | None = None) -> tuple[I8, F16]:
    """Codes and scales by least squared error, weighted by the columns' importance if given; no error feedback."""
    rows, columns = x.shape
    codes, scales = np.empty(x.shape, np.int8), np.empty((rows, columns // block), np.float16)
    step = max(1, _CACHED // columns)
    for i in range(0, rows, step):
        codes[i : i + step], scales[i : i + step] = _round_cached(x[i : i + step], bits, block, importance)
    return codes, scales


def _round_cached(x: F32, bits: int, block: int, importance: F32 | None) -> tuple[I8, F16]:
    blocks = x.reshape(-1, block)
    low = -(1 << bits - 1)
    upper, lower = blocks.max(axis=1), blocks.min(axis=1)
    # The largest weight goes to the lowest code: the grid reaches one step further that way.
    reach = np.where(upper > -lower, upper, lower)
    zero = np.full(len(blocks), np.float32(-low))
    candidates = ((reach * np.float32(shrink / low), zero) for shrink in SHRINK[bits])
    rounded, scale, _ = _best_grid(x, bits, block, importance, candidates)
    return rounded.astype(np.int8).reshape(x.shape), scale


def _affine_cached(x: F32, bits: int, block: int, importance: F32 | None) -> tuple[U8, F16, U8]:
    blocks, top = x.reshape(-1, block), (1 << bits) - 1
    upper, lower = blocks.max(axis=1).clip(min=0), blocks.min(axis=1).clip(max=0)
    reach = upper - lower
    even = np.rint(np.divide(-lower * top, reach, out=np.zeros_like(reach), where=reach > 0))
    candidates = (
        (reach * np.float32(shrink / top), np.clip(even + np.float32(shift), 0, top))
        for shrink in _AFFINE_SHRINK[bits]
        for shift in (0, -1, 1)
    )
    rounded, scale, zero = _best_grid(x, bits, block, importance, candidates)
    codes = (rounded + zero[:, None]).astype(np.uint8)
    return codes.reshape(x.shape), scale, zero.astype(np.uint8).reshape(len(x), -1)


def _best_grid(
    x: F32, bits: int, block: int, importance: F32 | None, candidates: Iterable[tuple[F32, F32]]
) -> tuple[F32, F16, F32]:
    """Of grids (scale and zero point of each block), the best for each: codes less zero points [blocks, block], scales
    [rows, columns / block], refitted, and zero points [blocks].
    """
    blocks, top = x.reshape(-1, block), (1 << bits) - 1
    weighted = blocks if importance is None else (x * importance).reshape(-1, block)
    rounded = np.empty_like(blocks)
    best, scale, zero = (np.zeros(len(blocks), np.float32) for _ in range(3))
    for step, z in candidates:
        _to_grid(blocks, step, -z[:, None], top - z[:, None], rounded)
        # Under the scale that fits these codes best, the (weighted) error is |x|^2 less this gain.
        dot = np.einsum("ij,ij->i", weighted, rounded)
        if importance is None:
            norm = np.einsum("ij,ij->i", rounded, rounded)
        else:
            norm = np.einsum("rbj,rbj,bj->rb", *[rounded.reshape(len(x), -1, block)] * 2, importance.reshape(-1, block))
            norm = norm.reshape(-1)
        fitted = np.divide(dot, norm, out=np.zeros_like(dot), where=norm > 0)
        gain = dot * fitted
        better = gain > best
        scale, zero, best = np.where(better, fitted, scale), np.where(better, z, zero), np.maximum(best, gain)
    stored = scale.astype(np.float16)
    _to_grid(blocks, stored.astype(np.float32), -zero[:, None], top - zero[:, None], rounded)
    return rounded, stored.reshape(len(x), -1), zero


def _to_grid(blocks: F32, scale: F32, low: F32, high: F32, out: F32) -> None:
    """Codes of each block under its scale into `out`; 0 where the scale is 0 or too small to divide by."""
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=np.abs(scale) > 1e-30)
    np.multiply(blocks, inverse[:, None], out=out)
    np.rint(out, out=out)
    np.clip(out, low, high, out=out)


def round_affine(x: F32, bits: int, block: int, factor: HessianFactor | None = None) -> tuple[U8, F16, U8]:
    """Codes [rows, columns], scales and zero points [rows, columns / block] of finite rows, with error feedback given a
    factor.
    """
    importance = None if factor is None else factor.importance
    rows, columns = x.shape
    codes = np.empty(x.shape, np.uint8)
    scales, zeros = np.empty((rows, columns // block), np.float16), np.empty((rows, columns // block), np.uint8)
    step = max(1, _CACHED // columns)
    for i in range(0, rows, step):
        part = slice(i, i + step)
        codes[part], scales[part], zeros[part] = _affine_cached(x[part], bits, block, importance)
    if factor is None:
        return codes, scales, zeros
    level = uniform(scales.astype(np.float32), block, bits, zeros.astype(np.float32))
    return round_columns(x, factor, level), scales, zeros


def dequantize_rows(codes: I8, scales: F16) -> F32:
    """The weights [rows, columns] that a runtime computes with."""
    rows, columns = codes.shape
    blocks = codes.reshape(rows, scales.shape[1], -1).astype(np.float32)
    blocks *= scales.astype(np.float32)[:, :, None]
    return blocks.reshape(rows, columns)


def fit_palettes(x: F32, bits: int, group: int, factor: HessianFactor | None = None) -> tuple[U8, F16]:
    """Codes [rows, columns] and tables [rows / group, 2**bits], rising, each fitted to its group of rows; with error
    feedback given a factor.

    One-dimensional k-means by Lloyd's algorithm on a histogram of each group.
    """
    importance = None if factor is None else factor.importance
    codes, tables = _fit_palettes(x, bits, group, importance)
    if factor is None:
        return codes, tables
    # The tables are fitted once more, to what errors have made of the weights by then.
    reached = values_at_rounding(x, factor, palette(tables.astype(np.float32), group))
    tables = _fit_palettes(reached, bits, group, importance)[1]
    return round_columns(x, factor, palette(tables.astype(np.float32), group)), tables


def _fit_palettes(x: F32, bits: int, group: int, importance: F32 | None = None) -> tuple[U8, F16]:
    groups = -(-len(x) // group)
    codes = np.empty(x.shape, np.uint8)
    tables = np.empty((groups, 1 << bits), np.float16)
    for g in range(groups):
        rows = slice(g * group, (g + 1) * group)
        tables[g], codes[rows] = _fit_palette(x[rows], 1 << bits, importance)
    return codes, tables


def _fit_palette(x: F32, size: int, importance: F32 | None) -> tuple[F16, U8]:
    low, high = float(x.min()), float(x.max())
    width = max((high - low) / _BINS, 1e-30)
    bins = np.minimum(((x - np.float32(low)) * np.float32(1 / width)).astype(np.int32), _BINS - 1)
    # Running sums of the counts and of the values: a cluster of bins [a, b) has the mean (M[b] - M[a]) / (N[b] - N[a]).
    weights = None if importance is None else np.broadcast_to(importance, x.shape).reshape(-1)
    count = np.bincount(bins.reshape(-1), weights, minlength=_BINS).astype(np.float64)
    centre = low + width * (np.arange(_BINS) + 0.5)
    N = np.concatenate([[0.0], np.cumsum(count)])
    M = np.concatenate([[0.0], np.cumsum(count * centre)])
    # Start where a cube-root density has equal shares: what is optimal for many levels (Panter and Dite, 1951).
    share = np.cumsum(np.cbrt(count))
    edges = np.searchsorted(share, share[-1] * np.arange(1, size) / size)
    for _ in range(_ROUNDS):
        cuts = np.concatenate([[0], edges, [_BINS]])
        mass = np.diff(N[cuts])
        middle = low + width * (cuts[:-1] + cuts[1:]) / 2  # of an empty cluster
        means = np.divide(np.diff(M[cuts]), mass, out=middle, where=mass > 0)
        halfway = (means[1:] + means[:-1]) / 2
        edges = np.clip(np.ceil((halfway - low) / width - 0.5), 0, _BINS).astype(np.int64)
    table = means.astype(np.float16)
    code_of_bin = np.searchsorted(edges, np.arange(_BINS), side="right").astype(np.uint8)
    return table, code_of_bin[bins]
