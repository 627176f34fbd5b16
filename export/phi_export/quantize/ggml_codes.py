"""Read and replace the codes of ggml's blocks: the steps of a quantised row, and new codes under them.

Every type here says weight = step * (code - zero) - offset, or step * table[code], with a step (and an offset, where
there is one) per `sub` weights. Layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from phi_export.quantize.ggml import GgmlType
from phi_export.quantize.gptq import Level, codebook, uniform
from phi_export.quantize.uniform import U8
from phi_runtime.architecture.decoder import F32


@dataclass(frozen=True)
class Layout:
    """How a type lays out a block. `steps` gives step and offset [n, block / sub] of blocks [n, block_bytes];
    `put` writes codes [n, block] into them.
    """

    bits: int
    zero: int
    sub: int
    steps: Callable[[U8], tuple[F32, F32 | None]]
    put: Callable[[U8, U8], None]
    table: F32 | None = None

    def level(self, step: F32, offset: F32 | None) -> Level:
        """The grid of rows, as error feedback rounds to it."""
        if self.table is not None:
            return codebook(step, self.sub, self.table)
        return uniform(step, self.sub, self.bits, self.zero, offset)


def open_rows(data: U8, kind: GgmlType) -> tuple[F32, F32 | None]:
    """Step and offset [rows, columns / sub] of quantised rows."""
    step, offset = LAYOUTS[kind.name].steps(data.reshape(-1, kind.block_bytes))
    return step.reshape(len(data), -1), None if offset is None else offset.reshape(len(data), -1)


def put_codes(data: U8, codes: U8, kind: GgmlType) -> None:
    """Replace all codes of quantised rows in place; their steps stay."""
    LAYOUTS[kind.name].put(data.reshape(-1, kind.block_bytes), codes.reshape(-1, kind.block))


def _half(blocks: U8, at: int) -> F32:
    return np.ascontiguousarray(blocks[:, at : at + 2]).view("<f2").astype(np.float32)


def _q2_steps(b: U8) -> tuple[F32, F32 | None]:
    return _half(b, 80) * (b[:, :16] & 15), _half(b, 82) * (b[:, :16] >> 4)


def _q2_put(b: U8, codes: U8) -> None:
    b[:, 16:80] = _quarters(codes)


def _quarters(codes: U8) -> U8:
    """The low two bits of codes [n, 256]: in each half, four runs of 32 share 32 bytes."""
    c = codes.reshape(-1, 2, 4, 32) & 3
    out: U8 = np.asarray(c[:, :, 0] | c[:, :, 1] << 2 | c[:, :, 2] << 4 | c[:, :, 3] << 6, np.uint8).reshape(-1, 64)
    return out


def _q3_steps(b: U8) -> tuple[F32, F32 | None]:
    s = b[:, 96:108]
    low = np.concatenate([s[:, :8] & 15, s[:, :8] >> 4], axis=1)
    high = np.concatenate([s[:, 8:] >> 2 * i & 3 for i in range(4)], axis=1)
    return _half(b, 108) * ((low | high << 4).astype(np.float32) - 32), None


def _q3_put(b: U8, codes: U8) -> None:
    top = (codes >> 2 & 1).reshape(-1, 8, 32)
    b[:, :32] = np.bitwise_or.reduce(top << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    b[:, 32:96] = _quarters(codes)


def _k_steps(b: U8) -> tuple[F32, F32 | None]:
    """Of Q4_K and Q5_K: eight steps and offsets of six bits, the high two bits of the latter four apart."""
    s = b[:, 4:16]
    step = np.concatenate([s[:, :4] & 63, s[:, 8:] & 15 | s[:, :4] >> 6 << 4], axis=1)
    offset = np.concatenate([s[:, 4:8] & 63, s[:, 8:] >> 4 | s[:, 4:8] >> 6 << 4], axis=1)
    return _half(b, 0) * step, _half(b, 2) * offset


def _nibbles(codes: U8, run: int) -> U8:
    """Codes [n, 2 * run * k] as bytes: a run in the low halves, the next one in the high halves."""
    c = codes.reshape(len(codes), -1, 2, run) & 15
    out: U8 = np.asarray(c[:, :, 0] | c[:, :, 1] << 4, np.uint8).reshape(len(codes), -1)
    return out


def _q4k_put(b: U8, codes: U8) -> None:
    b[:, 16:144] = _nibbles(codes, 32)


def _q5k_put(b: U8, codes: U8) -> None:
    top = (codes >> 4).reshape(-1, 8, 32)
    b[:, 16:48] = np.bitwise_or.reduce(top << np.arange(8, dtype=np.uint8)[:, None], axis=1)
    b[:, 48:176] = _nibbles(codes, 32)


def _q6_steps(b: U8) -> tuple[F32, F32 | None]:
    return _half(b, 208) * np.ascontiguousarray(b[:, 192:208]).view(np.int8), None


def _q6_put(b: U8, codes: U8) -> None:
    c = codes.reshape(-1, 2, 4, 32)
    low, high = c & 15, c >> 4
    b[:, :128] = np.concatenate([low[:, :, 0] | low[:, :, 2] << 4, low[:, :, 1] | low[:, :, 3] << 4], axis=2).reshape(
        -1, 128
    )
    b[:, 128:192] = (high[:, :, 0] | high[:, :, 1] << 2 | high[:, :, 2] << 4 | high[:, :, 3] << 6).reshape(-1, 64)


def _q4_put(b: U8, codes: U8) -> None:
    b[:, 2:] = _nibbles(codes, 16)


def _q8_put(b: U8, codes: U8) -> None:
    b[:, 2:] = codes ^ 128  # signed on disk


def _q41_steps(b: U8) -> tuple[F32, F32 | None]:
    return _half(b, 0), -_half(b, 2)


def _q41_put(b: U8, codes: U8) -> None:
    b[:, 4:] = _nibbles(codes, 16)


def _fifth_bits(codes: U8) -> U8:
    """The highest bit of each of 32 codes of five bits, the first one lowest."""
    return np.packbits(codes >> 4, axis=1, bitorder="little")


def _q50_put(b: U8, codes: U8) -> None:
    b[:, 2:6], b[:, 6:] = _fifth_bits(codes), _nibbles(codes, 16)


def _q51_put(b: U8, codes: U8) -> None:
    b[:, 4:8], b[:, 8:] = _fifth_bits(codes), _nibbles(codes, 16)


def _one_step(b: U8) -> tuple[F32, F32 | None]:
    return _half(b, 0), None


# ggml's kvalues_iq4nl.
_IQ4_NL = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)

LAYOUTS = {
    "Q2_K": Layout(2, 0, 16, _q2_steps, _q2_put),
    "Q3_K": Layout(3, 4, 16, _q3_steps, _q3_put),
    "Q4_0": Layout(4, 8, 32, _one_step, _q4_put),
    "IQ4_NL": Layout(4, 0, 32, _one_step, _q4_put, _IQ4_NL),
    "Q4_1": Layout(4, 0, 32, _q41_steps, _q41_put),
    "Q5_0": Layout(5, 16, 32, _one_step, _q50_put),
    "Q5_1": Layout(5, 0, 32, _q41_steps, _q51_put),
    "Q4_K": Layout(4, 0, 32, _k_steps, _q4k_put),
    "Q5_K": Layout(5, 0, 32, _k_steps, _q5k_put),
    "Q6_K": Layout(6, 32, 16, _q6_steps, _q6_put),
    "Q8_0": Layout(8, 128, 32, _one_step, _q8_put),
}
