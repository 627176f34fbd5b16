"""The calibration cache on disk: arrays, and GPTQ factors as packed float16 triangles."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from phi_export.quantize.gptq import HessianFactor, groups
from phi_runtime.errors import CheckpointError


def save_factor(folder: Path, name: str, factor: HessianFactor) -> None:
    """Keep a factor as NAME-factor.npy, NAME-importance.npy and NAME-order.npy."""
    n = len(factor.unit_upper[0])
    triangles = np.empty((len(factor.unit_upper), n * (n + 1) // 2), np.float16)
    for unit_upper, triangle in zip(factor.unit_upper, triangles, strict=True):
        for j, row in _rows(triangle, n):
            row[:] = unit_upper[j, j:]
    save_array(folder / f"{name}-factor.npy", triangles)
    save_array(folder / f"{name}-importance.npy", factor.importance)
    save_array(folder / f"{name}-order.npy", factor.order)


def _rows(triangle: np.ndarray, n: int) -> Iterator[tuple[int, np.ndarray]]:
    at = 0
    for j in range(n):
        yield j, triangle[at : at + n - j]
        at += n - j


@lru_cache(maxsize=1)  # parts of a matrix share it, and two of the widest are much memory
def load_factor(folder: Path, name: str) -> HessianFactor:
    """The factor kept by that name. Raises CheckpointError."""
    order, triangles = load_array(folder / f"{name}-order.npy"), load_array(folder / f"{name}-factor.npy")
    importance = load_array(folder / f"{name}-importance.npy")
    count = groups(len(order))
    n = len(order) // count
    whole = triangles.shape == (count, n * (n + 1) // 2) and importance.shape == order.shape
    dealt = whole and all(
        np.array_equal(np.sort(order[g * n : (g + 1) * n]), np.arange(g, len(order), count)) for g in range(count)
    )
    if not dealt or not (importance > 0).all():
        raise CheckpointError(f"{folder}: {name} is damaged; delete the folder and calibrate again")
    unit_uppers = [np.zeros((n, n), np.float32) for _ in range(count)]
    for unit_upper, triangle in zip(unit_uppers, triangles, strict=True):
        for j, row in _rows(triangle, n):
            unit_upper[j, j:] = row
    return HessianFactor(order, tuple(unit_uppers), importance)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write an array whole or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "wb") as f:
        np.save(f, array, allow_pickle=False)
    partial.replace(path)


def load_array(path: Path) -> np.ndarray:
    """Read an array. Raises CheckpointError."""
    try:
        return np.load(path, allow_pickle=False)  # type: ignore[no-any-return]
    except (OSError, ValueError, EOFError):
        raise CheckpointError(f"{path}: is damaged; delete its folder and calibrate again") from None
