"""Medians and the intervals around them: all randomness is seeded, so a file always gives the same figures."""

import math
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

F64 = npt.NDArray[np.float64]
_RESAMPLES = 4000
# Student's t at 97.5 % for 1 to 30 degrees of freedom.
_T = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def interval(values: Any, other: Any = None, paired: bool = False) -> tuple[float, float]:
    """A 95 % bootstrap interval of the median of some values, or of its ratio to another's.

    paired: the values were measured in turns, so that the ratio is of each pair. Few rounds make percentile intervals
    too narrow; these are widened as Student's t is for so many (Hesterberg 2015, "What Teachers Should Know about the
    Bootstrap", section 5.3). They never go beyond what was measured: with two or three values they are its range.
    """
    a = np.asarray(values, np.float64)
    b = None if other is None else np.asarray(other, np.float64)
    rng = np.random.default_rng(0)
    if b is not None and paired:
        a, b = a / b, None
    found = _medians(a, rng)
    if b is not None:
        found = found / _medians(b, rng)
    low = _tail(min(len(a), len(b) if b is not None else len(a)))
    return float(np.quantile(found, low)), float(np.quantile(found, 1 - low))


def change(before: Any, after: Any) -> tuple[float, float, float] | None:
    """How many times as large the values after are as those before, by ranks: the Hodges-Lehmann estimate and its 95 %
    interval, from the exact distribution of the Mann-Whitney statistic. None where so few values allow none.

    Times on a busy machine have outliers; ranks do not mind them. For 24 values with a spread of 10 % the interval is
    half as wide as that of a ratio of medians.
    """
    a, b = np.log(np.asarray(before, np.float64)), np.log(np.asarray(after, np.float64))
    least = _critical(len(a), len(b))
    if least is None:
        return None
    apart = np.sort((b[:, None] - a[None, :]).ravel())
    middle, low, high = np.exp([np.median(apart), apart[least], apart[-1 - least]])
    return float(middle), float(low), float(high)


def _critical(n: int, m: int) -> int | None:
    """The largest u with P(U <= u) <= 2.5 %, where U counts the pairs of n and m like values that are in order."""
    counts = np.zeros(n * m + 1)  # of the ways to get each U with the values so far: the Gaussian binomial coefficient
    counts[0] = 1
    for i in range(1, n + 1):
        for u in range(n * m, m + i - 1, -1):
            counts[u] -= counts[u - m - i]
        for u in range(i, n * m + 1):
            counts[u] += counts[u - i]
    below = np.cumsum(counts) / counts.sum()
    found = int(np.searchsorted(below, 0.025, side="right")) - 1
    return found if found >= 0 else None


def _medians(values: F64, rng: np.random.Generator) -> F64:
    drawn = rng.integers(0, len(values), (_RESAMPLES, len(values)))
    return np.median(values[drawn], axis=1)


def _tail(n: int) -> float:
    """The share of resamples outside either end, for n values."""
    if n < 2:
        return 0.0
    t = _T[n - 2] if n - 2 < len(_T) else 1.96
    return NormalDist().cdf(-t * math.sqrt(n / (n - 1)))


def spread(values: Any) -> float:
    """How far the middle half of some values reaches, relative to their median."""
    a = np.asarray(values, np.float64)
    low, high = np.quantile(a, [0.25, 0.75])
    return float((high - low) / np.median(a))
