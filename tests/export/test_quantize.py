import numpy as np
import pytest

from phi_export.quantize import BLOCK, Int4, pack_pairs, pack_q4_0, quantize_rows, unpack_pairs


@pytest.fixture
def weights():
    return np.random.default_rng(0).normal(0, 0.02, (64, 256)).astype(np.float32)


def nearest(x):
    """Round to nearest under the scale that just reaches the largest weight: the naive way."""
    blocks = x.reshape(-1, BLOCK)
    largest = np.take_along_axis(blocks, np.abs(blocks).argmax(1)[:, None], 1)
    scale = (largest / -8).astype(np.float16).astype(np.float32)
    return (scale * np.clip(np.rint(blocks / scale), -8, 7)).reshape(x.shape)


def test_the_scale_is_better_than_the_naive_one(weights):
    error = np.square(quantize_rows(weights).dequantize() - weights).sum()
    assert error < 0.95 * np.square(nearest(weights) - weights).sum()


def test_no_block_is_worse_than_the_bound_that_verify_uses(weights):
    for x in (weights, weights**3, np.abs(weights), np.where(np.arange(256) % 32 == 7, weights * 50, weights)):
        error = np.square(quantize_rows(x).dequantize() - x).reshape(-1, BLOCK).sum(1)
        assert (error <= 0.125 * np.square(x).reshape(-1, BLOCK).sum(1) + 1e-12).all()


def test_what_the_grid_holds_comes_back_exactly():
    rng = np.random.default_rng(1)
    scales = np.float16(rng.uniform(0.001, 0.1, (8, 4)))
    codes = rng.integers(0, 16, (8, 4 * BLOCK), dtype=np.uint8)
    codes[:, ::BLOCK] = 0
    exact = Int4(codes, scales).dequantize()
    assert np.array_equal(quantize_rows(exact).dequantize(), exact)


def test_zeros_stay_zeros():
    assert not quantize_rows(np.zeros((2, 64), np.float32)).dequantize().any()


def test_pairs_unpack_to_what_was_packed(weights):
    codes = quantize_rows(weights).codes
    assert np.array_equal(unpack_pairs(pack_pairs(codes)), codes)


def test_q4_0_is_what_the_gguf_package_reads(weights):
    import gguf

    q = quantize_rows(weights)
    read = gguf.dequantize(pack_q4_0(q), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(read, q.dequantize())
