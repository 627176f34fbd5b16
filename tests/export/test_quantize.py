import numpy as np
import pytest

from phi_export.formats import get_format
from phi_export.formats.gguf.write import _TYPES as GGML
from phi_export.quantize import ggml
from phi_export.quantize.q4 import quantize_q4_0, quantize_q4_k
from phi_export.quantize.uniform import dequantize_rows, fit_palettes, round_affine, round_rows
from phi_runtime.package.bits import pack, unpack
from phi_runtime.package.manifest import ExportOptions


@pytest.fixture
def weights():
    return np.random.default_rng(0).normal(0, 0.02, (64, 1024)).astype(np.float32)


def relative(a, b):
    return np.square(a - b).sum() / np.square(b).sum()


def palette_values(codes, tables, group):
    return np.take_along_axis(np.repeat(tables, group, 0).astype(np.float32), codes.astype(np.int64), 1)


def odd(weights):
    """Weights as nothing is distributed: heavy tails, one sign only, an outlier in every block, tiny, large, zeros."""
    column = np.arange(weights.shape[1])
    tails = weights**3 * 1000
    return tails, np.abs(weights), -np.abs(weights), np.where(column % 32 == 7, weights * 50, weights), weights * 1e4


@pytest.mark.parametrize(("bits", "block"), [(4, 16), (4, 32), (4, 128), (4, 256), (2, 64), (2, 128), (8, 128)])
def test_the_scale_is_better_than_the_naive_one(bits, block, weights):
    codes, scales = round_rows(weights, bits, block)
    assert codes.min() >= -(1 << bits - 1) and codes.max() <= (1 << bits - 1) - 1
    blocks = weights.reshape(-1, block)
    scale = np.abs(blocks).max(1, keepdims=True) / (1 << bits - 1)
    naive = scale * np.clip(np.rint(blocks / scale), -(1 << bits - 1), (1 << bits - 1) - 1)
    limit = 1.01 if bits == 8 else 0.95
    assert relative(dequantize_rows(codes, scales), weights) < limit * relative(naive.reshape(weights.shape), weights)


def test_what_the_grid_holds_comes_back_exactly():
    rng = np.random.default_rng(1)
    scales = np.float16(rng.uniform(0.001, 0.1, (8, 4)))
    codes = rng.integers(-8, 8, (8, 128), dtype=np.int8)
    codes[:, ::32] = -8
    exact = dequantize_rows(codes, scales)
    assert np.array_equal(dequantize_rows(*round_rows(exact, 4, 32)), exact)


@pytest.mark.parametrize("block", [16, 32, 64, 128])
def test_zero_points_are_worth_their_bits(block, weights):
    for x in (weights, *odd(weights)):
        codes, scales, zeros = round_affine(x, 4, block)
        assert codes.max() <= 15 and zeros.max() <= 15
        signed = codes.reshape(*zeros.shape, -1).astype(np.int8) - zeros.astype(np.int8)[:, :, None]
        error = relative(dequantize_rows(signed.reshape(x.shape), scales), x)
        assert error <= relative(dequantize_rows(*round_rows(x, 4, block)), x)
    one_sided = np.abs(weights)
    codes, scales, zeros = round_affine(one_sided, 4, block)
    assert (zeros <= 1).all()  # the whole range of the codes goes where the weights are


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_a_palette_is_no_worse_than_an_even_one(bits, weights):
    for x in (weights, *odd(weights)):
        codes, tables = fit_palettes(x, bits, 16)
        groups = x.reshape(4, -1)
        low, step = groups.min(1, keepdims=True), np.ptp(groups, axis=1, keepdims=True) / ((1 << bits) - 1)
        even = (low + step * np.rint((groups - low) / step)).reshape(x.shape)
        assert relative(palette_values(codes, tables, 16), x) <= relative(even, x)
    constant = np.full((16, 32), 0.5, np.float32)
    assert np.array_equal(palette_values(*fit_palettes(constant, bits, 16), 16), constant)


def test_zeros_stay_zeros():
    zeros = np.zeros((16, 256), np.float32)
    assert not dequantize_rows(*round_rows(zeros, 4, 32)).any()
    assert not palette_values(*fit_palettes(zeros, 3, 16), 16).any()
    for kind, function in (("Q4_0", quantize_q4_0), ("Q4_K", quantize_q4_k)):
        assert not ggml.dequantize(function(zeros), GGML[kind]).any()


@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("signed", [True, False])
def test_codes_unpack_to_what_was_packed(bits, signed):
    low = -(1 << bits - 1) if signed else 0
    codes = np.random.default_rng(0).integers(low, low + (1 << bits), (5, 64))
    codes = codes.astype(np.int8 if signed else np.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (5, 64 * bits // 8)
    assert np.array_equal(unpack(packed, bits, signed), codes)


@pytest.mark.parametrize(("kind", "function"), [("Q4_0", quantize_q4_0), ("Q4_K", quantize_q4_k)])
def test_our_own_gguf_types_are_what_everyone_reads(kind, function, weights):
    import gguf

    for x in (weights, *odd(weights)):
        raw = function(x)
        assert np.allclose(gguf.dequantize(raw, gguf.GGMLQuantizationType[kind]), ggml.dequantize(raw, GGML[kind]))
        theirs = ggml.dequantize(ggml.quantize(x, GGML[kind]), GGML[kind])
        limit = 1.1 if kind == "Q4_K" else 1.0
        assert relative(ggml.dequantize(raw, GGML[kind]), x) <= limit * relative(theirs, x) + 1e-7


@pytest.mark.parametrize("name", ["gguf", "onnx", "coreml"])
def test_the_errors_in_the_tables_are_the_measured_ones(name, weights):
    """The solver and verification go by them."""
    module = get_format(name)
    for profile in module.PROFILES:
        for kind in module.types(ExportOptions(profile)).values():
            if name == "gguf":
                quantize = {"Q4_0": quantize_q4_0, "Q4_K": quantize_q4_k}.get(kind.name)
                raw = quantize(weights) if quantize else ggml.quantize(weights, kind)
                assert raw.nbytes == kind.nbytes(*weights.shape)
                read = ggml.dequantize(raw, kind)
            elif "palette" in kind.name:
                codes, tables = fit_palettes(weights, kind.bits, 16)
                read = palette_values(codes, tables, 16)
                assert pack(codes, kind.bits).nbytes + tables.nbytes == kind.nbytes(*weights.shape)
            else:
                codes, scales = round_rows(weights, kind.bits, kind.block)
                read = dequantize_rows(codes, scales)
            measured = relative(read, weights)
            assert measured == pytest.approx(kind.error, rel=0.25), (kind.name, measured)


def test_pieces_do_not_change_the_result(weights):
    whole, scales = round_rows(weights, 4, 128)
    for start in (0, 13, 50):
        part, part_scales = round_rows(weights[start : start + 9], 4, 128)
        assert np.array_equal(part, whole[start : start + 9])
        assert np.array_equal(part_scales, scales[start : start + 9])
    assert np.array_equal(quantize_q4_k(weights)[10:20], quantize_q4_k(weights[10:20]))
