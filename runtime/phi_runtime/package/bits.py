"""Codes of a few bits as streams of bits, as ONNX, Core ML and MLX store them."""

import numpy as np


def pack(codes: np.ndarray, bits: int) -> np.ndarray:
    """Rows of codes as a stream of `bits` bits each, the first in the lowest bits: uint8 [rows, columns * bits / 8].

    Negative codes become two's complement. Columns times bits must fill whole bytes.
    """
    c = codes.view(np.uint8) if codes.dtype == np.int8 else codes.astype(np.uint8, copy=False)
    if bits == 8:
        return c
    c = c & np.uint8((1 << bits) - 1)
    if bits in (2, 4):
        out = c[:, 0 :: 8 // bits].copy()
        for i in range(1, 8 // bits):
            out |= c[:, i :: 8 // bits] << np.uint8(bits * i)
        return out
    # Groups of 8 codes make `bits` whole bytes.
    wide = c.reshape(len(c), -1, 8).astype(np.uint64)
    word = np.zeros(wide.shape[:2], np.uint64)
    for i in range(8):
        word |= wide[:, :, i] << np.uint64(bits * i)
    stream = word[:, :, None].view(np.uint8).reshape(*word.shape, 8)[:, :, :bits]
    return np.ascontiguousarray(stream).reshape(len(c), -1)


def unpack(packed: np.ndarray, bits: int, signed: bool) -> np.ndarray:
    """The inverse of `pack`, along the last axis: uint8, or int8 where signed."""
    if bits == 8:
        return packed.view(np.int8) if signed else packed
    if bits in (2, 4):
        codes = np.empty((*packed.shape, 8 // bits), np.uint8)
        for i in range(8 // bits):
            np.bitwise_and(packed >> np.uint8(bits * i), np.uint8((1 << bits) - 1), out=codes[..., i])
    else:
        lanes = packed.reshape(*packed.shape[:-1], -1, bits).astype(np.uint64)
        word = np.zeros(lanes.shape[:-1], np.uint64)
        for i in range(bits):
            word |= lanes[..., i] << np.uint64(8 * i)
        codes = np.empty((*word.shape, 8), np.uint8)
        for i in range(8):
            codes[..., i] = (word >> np.uint64(bits * i)) & np.uint64((1 << bits) - 1)
    flat = codes.reshape(*packed.shape[:-1], -1)
    if not signed:
        return flat
    return (flat << np.uint8(8 - bits)).view(np.int8) >> np.int8(8 - bits)
