"""GGUF's two types of 4.5 bits, rounded here: Q4_0 errs a tenth less than by ggml's own rounding, and Q4_K
takes a quarter of the time of ggml's search for 4 % more error.

Layouts: ggml's block_q4_0 and block_q4_K (https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h).
"""

import numpy as np

from phi_export.quantize.uniform import U8, round_rows
from phi_runtime.architecture.decoder import F32

_SUB, _SUPER = 32, 256
_CACHED = 1 << 18  # weights worked on at a time
# What the first grid spans, in units of the block's range, and how often scale and minimum are then fitted anew.
_SPANS, _FITS = (1.0, 1 / 1.15), 2


def quantize_q4_0(x: F32) -> U8:
    """Rows as Q4_0: per 32 weights a float16 scale, then 16 bytes, weight j low and j + 16 high, codes from 0."""
    codes, scales = round_rows(x, 4, _SUB)
    unsigned = (codes + np.int8(8)).view(np.uint8).reshape(len(x), -1, 2, _SUB // 2)
    halves = unsigned[:, :, 0] | (unsigned[:, :, 1] << np.uint8(4))
    blocks = np.concatenate([scales.view(np.uint8).reshape(len(x), -1, 2), halves], axis=2)
    return blocks.reshape(len(x), -1)


def quantize_q4_k(x: F32) -> U8:
    """Rows as Q4_K: weight = d * scale * code - dmin * minimum; per 256 weights d and dmin in float16, eight scales
    and minima of 6 bits, 256 codes of 4 bits.
    """
    step = max(1, _CACHED // x.shape[1])
    return np.concatenate([_q4_k_cached(x[i : i + step]) for i in range(0, len(x), step)])


def _q4_k_cached(x: F32) -> U8:
    t = np.ascontiguousarray(x.reshape(-1, _SUB).T)  # a block per column: sums run along whole rows
    scale, minimum = _fit(t)
    scales, minima = np.maximum(scale, 0).reshape(-1, 8), minimum.reshape(-1, 8)
    d, dmin = ((v.max(axis=1) / 63).astype(np.float16) for v in (scales, minima))
    steps, offsets = _six_bits(scales, d), _six_bits(minima, dmin)
    codes = np.empty_like(t)
    _to_codes(t, _widen(steps, d), _widen(offsets, dmin), codes)
    nibbles = np.ascontiguousarray(codes.astype(np.uint8).T).reshape(-1, 4, 2, _SUB)
    packed = np.empty((len(d), 144), np.uint8)
    packed[:, 0:2], packed[:, 2:4] = d.view(np.uint8).reshape(-1, 2), dmin.view(np.uint8).reshape(-1, 2)
    # The low four scales and minima whole, with the high two bits of the other four above them.
    packed[:, 4:8] = steps[:, :4] | (steps[:, 4:] >> 4 << 6)
    packed[:, 8:12] = offsets[:, :4] | (offsets[:, 4:] >> 4 << 6)
    packed[:, 12:16] = (steps[:, 4:] & 15) | ((offsets[:, 4:] & 15) << 4)
    packed[:, 16:] = (nibbles[:, :, 0] | (nibbles[:, :, 1] << np.uint8(4))).reshape(-1, 128)
    return packed.reshape(len(x), -1)


def _fit(t: F32) -> tuple[F32, F32]:
    """Scale and minimum (not below 0) of each column [32, n]: the best by least squares of a few roundings."""
    low = np.minimum(t.min(axis=0), 0)
    span = t.max(axis=0) - low
    total = t.sum(axis=0)
    best = np.full(t.shape[1], -np.inf, np.float32)
    best_scale, best_minimum = np.zeros_like(best), np.zeros_like(best)
    q, product = np.empty_like(t), np.empty_like(t)
    for share in _SPANS:
        scale, minimum = span * np.float32(share / 15), -(low + span * np.float32((1 - share) / 2))
        for _ in range(_FITS):
            _to_codes(t, scale, minimum, q)
            sum_q = q.sum(axis=0)
            sum_qq = np.multiply(q, q, out=product).sum(axis=0)
            sum_qx = np.multiply(q, t, out=product).sum(axis=0)
            # Least squares of x = scale * q - minimum; without a minimum where it would be below 0.
            spread = _SUB * sum_qq - sum_q * sum_q
            scale = _divide(_SUB * sum_qx - total * sum_q, spread)
            minimum = (scale * sum_q - total) / _SUB
            scale = np.where(minimum < 0, _divide(sum_qx, sum_qq), scale)
            minimum = np.maximum(minimum, 0)
            gain = (
                2 * scale * sum_qx
                - 2 * minimum * total
                - scale * scale * sum_qq
                + 2 * scale * minimum * sum_q
                - _SUB * minimum * minimum
            )
            better = gain > best
            best_scale, best_minimum = np.where(better, scale, best_scale), np.where(better, minimum, best_minimum)
            best = np.maximum(best, gain)
    return best_scale, best_minimum


def _to_codes(t: F32, scale: F32, minimum: F32, out: F32) -> None:
    np.add(t, minimum, out=out)
    np.multiply(out, _divide(np.ones_like(scale), scale), out=out)
    np.rint(out, out=out)
    np.clip(out, 0, 15, out=out)


def _divide(a: F32, b: F32) -> F32:
    """a / b, 0 where b is 0 or too small to divide by."""
    return np.divide(a, b, out=np.zeros_like(a), where=b > 1e-30)


def _six_bits(values: F32, unit: np.ndarray) -> U8:
    wide = np.broadcast_to(unit.astype(np.float32)[:, None], values.shape)
    return np.clip(np.rint(_divide(values, wide)), 0, 63).astype(np.uint8)


def _widen(codes: U8, unit: np.ndarray) -> F32:
    out: F32 = (codes * unit.astype(np.float32)[:, None]).reshape(-1)
    return out
