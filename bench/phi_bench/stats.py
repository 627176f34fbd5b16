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
