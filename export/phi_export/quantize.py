"""Rounding weights to 4 bits: one set of codes and scales, which every format packs its own way.

value = scale * (code - 8), code in 0..15, one float16 scale per block of `BLOCK` weights along a
row. That grid is GGUF's Q4_0, MatMulNBits' symmetric int4 and Core ML's int4 alike, so the three
bundles of one checkpoint hold the very same weights.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phi_runtime.checkpoint import F32, Tensor
from phi_runtime.errors import CheckpointError, UnsupportedError

U8 = npt.NDArray[np.uint8]
F16 = npt.NDArray[np.float16]

BLOCK = 32
Q4_0_BYTES = 2 + BLOCK // 2  # of a block in GGUF: its scale, then two codes a byte
_PIECE = 1 << 20  # weights rounded at a time; bounds the memory
# Tried as scales, in units of the one that just reaches a block's largest weight. Clipping it a
# little often costs less than a coarser grid for the other 31.
_SHRINK = np.linspace(0.72, 1.04, 9, dtype=np.float32)


@dataclass(frozen=True)
class Int4:
    """A quantised matrix: codes [rows, columns] of 0..15 and scales [rows, columns / BLOCK]."""

    codes: U8
    scales: F16

    def dequantize(self) -> F32:
        """The weights [rows, columns] that a runtime computes with."""
        rows, columns = self.codes.shape
        centred = self.codes.reshape(rows, -1, BLOCK).astype(np.float32) - 8
        out: F32 = (centred * self.scales.astype(np.float32)[:, :, None]).reshape(rows, columns)
        return out


def check_quantizable(name: str, shape: tuple[int, ...]) -> None:
    """Raise UnsupportedError unless the rows divide into whole blocks."""
    if shape[-1] % BLOCK:
        raise UnsupportedError(f"tensor {name} has rows of {shape[-1]} weights; int4 needs a multiple of {BLOCK}")


def quantize(tensor: Tensor) -> Int4:
    """Round a matrix to the nearest codes under the best scale per block (least squared error).

    The matrix is read in pieces, so memory stays at its quantised size.
    Raises CheckpointError for a weight that is not finite or beyond float16's range.
    """
    rows, columns = tensor.shape
    codes = np.empty((rows, columns), np.uint8)
    scales = np.empty((rows, columns // BLOCK), np.float16)
    step = max(1, _PIECE // columns)
    for start in range(0, rows, step):
        piece = finite(tensor, start, start + step)
        part = quantize_rows(piece)
        codes[start : start + step], scales[start : start + step] = part.codes, part.scales
    return Int4(codes, scales)


def finite(tensor: Tensor, start: int = 0, stop: int | None = None) -> F32:
    """Rows of a tensor, refused where a value cannot be carried in float16."""
    piece = tensor.read(start, stop)
    largest = np.abs(piece).max(initial=0.0)
    if not largest <= np.finfo(np.float16).max:  # also false for NaN
        raise CheckpointError(
            f"{tensor.path}: tensor {tensor.name} holds {'a NaN' if np.isnan(largest) else f'the value {largest:g}'}, "
            "which float16 cannot carry; mend the checkpoint before exporting it"
        )
    return piece


def quantize_rows(x: F32) -> Int4:
    """Quantise finite rows [rows, columns], columns a multiple of BLOCK."""
    rows, columns = x.shape
    blocks = x.reshape(-1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(axis=1)[:, None], axis=1)
    best_error = np.full((len(blocks), 1), np.inf, np.float32)
    best_scale = np.zeros((len(blocks), 1), np.float32)
    for shrink in _SHRINK:
        # The largest weight goes to code 0, i.e. -8: the grid reaches one step further that way.
        scale = _float16(largest * (shrink / -8))
        centred = _round(blocks, scale)
        # The scale that fits these codes best, then the codes anew under it.
        weight = (centred * centred).sum(axis=1, keepdims=True)
        fitted = _float16((blocks * centred).sum(axis=1, keepdims=True) / np.maximum(weight, 1))
        for candidate in (scale, fitted):
            error = np.square(blocks - candidate * _round(blocks, candidate)).sum(axis=1, keepdims=True)
            better = error < best_error
            best_error = np.where(better, error, best_error)
            best_scale = np.where(better, candidate, best_scale)
    codes = (_round(blocks, best_scale) + 8).astype(np.uint8)
    return Int4(codes.reshape(rows, columns), best_scale.astype(np.float16).reshape(rows, -1))


def _round(blocks: F32, scale: F32) -> F32:
    """Codes less 8, as float32; 0 where the scale is 0."""
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale != 0)
    return np.clip(np.rint(blocks * inverse), -8, 7)


def _float16(scale: F32) -> F32:
    return scale.astype(np.float16).astype(np.float32)


def pack_pairs(codes: U8) -> U8:
    """Neighbours share a byte, the first in the low half (ONNX, Core ML): [rows, columns / 2]."""
    packed: U8 = codes[:, 0::2] | (codes[:, 1::2] << np.uint8(4))
    return packed


def pack_signed_pairs(codes: U8) -> U8:
    """As `pack_pairs`, of the codes less 8 in two's complement (INT4 of ONNX and Core ML)."""
    return pack_pairs(codes ^ np.uint8(8))


def unpack_pairs(packed: U8) -> U8:
    """The inverse of `pack_pairs`."""
    out = np.empty((packed.shape[0], 2 * packed.shape[1]), np.uint8)
    out[:, 0::2], out[:, 1::2] = packed & 15, packed >> 4
    return out


def pack_q4_0(q: Int4) -> U8:
    """GGUF's Q4_0 rows: per block a float16 scale, then 16 bytes, weight j low and j + 16 high."""
    rows, columns = q.codes.shape
    blocks = q.codes.reshape(rows, -1, 2, BLOCK // 2)
    halves = blocks[:, :, 0] | (blocks[:, :, 1] << 4)
    scales = q.scales.view(np.uint8).reshape(rows, -1, 2)
    return np.concatenate([scales, halves], axis=2).reshape(rows, columns // BLOCK * Q4_0_BYTES)
