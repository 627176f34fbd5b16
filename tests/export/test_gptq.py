import numpy as np
import pytest
from support import feedback_noise

from phi_export.calibrate.equalise import choose
from phi_export.formats.gguf.write import _TYPES, _quantize
from phi_export.quantize import ggml
from phi_export.quantize.ggml_codes import LAYOUTS, open_rows, put_codes
from phi_export.quantize.gptq import DAMPING, HessianFactor, factorise, groups, round_columns, uniform
from phi_export.quantize.uniform import dequantize_rows, fit_palettes, round_rows

C = 512
RANDOM = np.random.default_rng(0)
# Activations that share directions, some of them much larger than others, as a model's do.
MIXED = np.arange(1, C + 1, dtype=np.float32)[:, None] ** -0.7 * RANDOM.standard_normal((C, C)).astype(np.float32)
X = RANDOM.standard_normal((4096, C)).astype(np.float32) @ MIXED
MOMENT = X.T @ X / np.float32(len(X))
W = RANDOM.standard_normal((64, C)).astype(np.float32) * np.float32(0.02)


def cost(rounded):
    d = (rounded - W).astype(np.float64)
    return float(np.einsum("rc,cd,rd->", d, MOMENT.astype(np.float64), d))


def test_the_factor_is_that_of_the_inverse():
    f = factorise(MOMENT)
    assert sorted(f.order) == list(range(C))
    assert np.all(np.diff(np.diag(MOMENT)[f.order]) <= 0)
    damped = MOMENT.astype(np.float64)[np.ix_(f.order, f.order)]
    damped[np.diag_indices(C)] += DAMPING * np.diag(MOMENT).mean()
    upper = np.linalg.cholesky(np.linalg.inv(damped)).T
    np.testing.assert_allclose(f.unit_upper[0], upper / np.diag(upper)[:, None], atol=1e-4)


@pytest.mark.parametrize("used", [0.0, 1e-20])
def test_inputs_that_were_never_used_do_no_harm(used):
    f = factorise(np.full((C, C), used, np.float32))
    assert np.isfinite(f.unit_upper[0]).all()


def test_feedback_is_optimal_column_by_column():
    """The definition: whenever a column is rounded, those to come are what costs least beside all that are fixed."""
    size = 48
    moment, original = MOMENT[:size, :size], W[:, :size].astype(np.float64)
    f = factorise(moment)
    codes = round_columns(W[:, :size], f, uniform(np.full((len(W), 1), 0.01, np.float32), size, 4, 8))
    damped = moment + DAMPING * np.diag(moment).mean() * np.eye(size)
    w, wrong = original.copy(), 0
    for n, j in enumerate(f.order):
        wrong += int((np.clip(np.rint(w[:, j] / 0.01) + 8, 0, 15) != codes[:, j]).sum())
        w[:, j] = 0.01 * (codes[:, j].astype(float) - 8)
        done, rest = f.order[: n + 1], f.order[n + 1 :]
        fixed = damped[np.ix_(rest, done)] @ (w[:, done] - original[:, done]).T
        w[:, rest] = original[:, rest] - np.linalg.solve(damped[np.ix_(rest, rest)], fixed).T
    assert wrong <= 3  # ties


@pytest.mark.parametrize("name", list(_TYPES))
def test_ggmls_blocks_laid_open(name):
    kind, layout = _TYPES[name], LAYOUTS[name]
    data = ggml.quantize(W, kind)
    step, offset = (None if v is None else np.repeat(v, layout.sub, axis=1) for v in open_rows(data, kind))
    codes = RANDOM.integers(0, 1 << layout.bits, W.shape).astype(np.uint8)
    put_codes(data, codes, kind)
    values = codes.astype(np.float32) - layout.zero if layout.table is None else layout.table[codes]
    meant = values * step - (0 if offset is None else offset)
    np.testing.assert_allclose(ggml.dequantize(data, kind), meant, atol=1e-7)


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_0", "Q4_K", "Q5_K", "Q6_K"])
def test_feedback_costs_less_than_rounding_in_every_ggml_type(name):
    kind = _TYPES[name]
    plain, fed = (ggml.dequantize(_quantize(W, kind, f), kind) for f in (None, factorise(MOMENT)))
    assert cost(fed) < 0.35 * cost(plain)


@pytest.mark.parametrize(("bits", "block"), [(2, 64), (4, 32), (4, 128), (8, 128)])
def test_feedback_costs_less_on_integer_grids(bits, block):
    plain, fed = (dequantize_rows(*round_rows(W, bits, block, f)) for f in (None, factorise(MOMENT)))
    assert cost(fed) < 0.35 * cost(plain)


@pytest.mark.parametrize("bits", [2, 3, 4, 6])
def test_feedback_costs_less_with_palettes(bits):
    def rounded(factor):
        codes, tables = fit_palettes(W, bits, 16, factor)
        return np.take_along_axis(np.repeat(tables.astype(np.float32), 16, axis=0), codes.astype(int), axis=1)

    assert cost(rounded(factorise(MOMENT))) < 0.35 * cost(rounded(None))


def test_without_shared_directions_feedback_is_plain_rounding():
    alone = HessianFactor(RANDOM.permutation(C), (np.eye(C, dtype=np.float32),), np.ones(C, np.float32))
    for bits, block in ((2, 64), (4, 32), (8, 128)):
        for a, b in zip(round_rows(W, bits, block), round_rows(W, bits, block, alone), strict=True):
            np.testing.assert_array_equal(a, b)


def test_rows_do_not_depend_on_their_neighbours():
    f = factorise(MOMENT)
    whole, _ = round_rows(W, 4, 128, f)
    parts = [round_rows(W[i : i + 16], 4, 128, f)[0] for i in range(0, 64, 16)]
    assert (whole != np.concatenate(parts)).mean() < 1e-3  # but for the order of sums


def test_groups_of_columns_are_a_moment_without_what_lies_between():
    apart = np.zeros_like(MOMENT)
    for n in range(2):
        apart[n::2, n::2] = MOMENT[n::2, n::2]
    dealt, whole = factorise(MOMENT[::2, ::2], MOMENT[1::2, 1::2]), factorise(apart)
    np.testing.assert_allclose(dealt.importance, whole.importance, rtol=1e-3)
    for a, b in zip(round_rows(W, 4, 128, dealt), round_rows(W, 4, 128, whole), strict=True):
        assert (a != b).mean() < 1e-2  # but for the order of sums
    scale = np.where(np.arange(C) % 2, 2.0, 0.5).astype(np.float32)
    parts = [MOMENT[n::2, n::2] / scale[n::2, None] / scale[n::2] for n in range(2)]
    mean = np.mean([np.diag(part).mean() for part in parts])
    damped = [part + np.float32(DAMPING * mean) * np.eye(C // 2, dtype=np.float32) for part in parts]
    back = factorise(*(part * scale[n::2, None] * scale[n::2] for n, part in enumerate(damped)))
    np.testing.assert_allclose(factorise(*parts).unscaled(scale).importance, back.importance, rtol=0.01)
    assert [groups(c) for c in (192, 4096, 8192, 16384, 17920)] == [1, 1, 2, 4, 5]


def test_a_factor_of_scaled_columns_gives_that_of_the_columns():
    scale = np.ldexp(1.0, choose(np.diag(MOMENT)).astype(int)).astype(np.float32)
    plain = W * 1.0
    scaled = factorise(MOMENT / scale[:, None] / scale)
    back = scaled.unscaled(scale)
    # The same inverse of the moment but for the damping, whose place is another.
    fed = [dequantize_rows(*round_rows(plain, 4, 128, f)) for f in (factorise(MOMENT), back)]
    assert cost(fed[1]) == pytest.approx(cost(fed[0]), rel=0.3)


def test_noise_is_what_feedback_leaves_behind():
    f = factorise(MOMENT)
    fed = dequantize_rows(*round_rows(W, 4, 128, f))
    relative = np.square(dequantize_rows(*round_rows(W, 4, 128)) - W).sum() / np.square(W).sum()
    drawn = feedback_noise(f, relative, W, np.random.default_rng(1))
    assert cost(W + drawn) == pytest.approx(cost(fed), rel=0.35)
