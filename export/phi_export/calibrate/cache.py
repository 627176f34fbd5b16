"""What calibration keeps on disk: arrays, and the factors of error feedback as the rows of a triangle in float16."""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np

from phi_export.quantize.gptq import Factor, groups
from phi_runtime.errors import CheckpointError


def save_factor(folder: Path, name: str, factor: Factor) -> None:
    """Keep a factor as NAME-spread.npy, NAME-importance.npy and NAME-order.npy."""
    n = len(factor.spread[0])
    triangles = np.empty((len(factor.spread), n * (n + 1) // 2), np.float16)
    for spread, triangle in zip(factor.spread, triangles, strict=True):
        for j, row in _rows(triangle, n):
            row[:] = spread[j, j:]
    save_array(folder / f"{name}-spread.npy", triangles)
    save_array(folder / f"{name}-importance.npy", factor.importance)
    save_array(folder / f"{name}-order.npy", factor.order)


def _rows(triangle: np.ndarray, n: int) -> Iterator[tuple[int, np.ndarray]]:
    at = 0
    for j in range(n):
        yield j, triangle[at : at + n - j]
        at += n - j


@lru_cache(maxsize=1)  # parts of a matrix share it, and two of the widest are much memory
def load_factor(folder: Path, name: str) -> Factor:
    """The factor kept by that name. Raises CheckpointError."""
    order, triangles = load_array(folder / f"{name}-order.npy"), load_array(folder / f"{name}-spread.npy")
    importance = load_array(folder / f"{name}-importance.npy")
    count = groups(len(order))
    n = len(order) // count
    whole = triangles.shape == (count, n * (n + 1) // 2) and importance.shape == order.shape
    dealt = whole and all(
        np.array_equal(np.sort(order[g * n : (g + 1) * n]), np.arange(g, len(order), count)) for g in range(count)
    )
    if not dealt or not (importance > 0).all():
        raise CheckpointError(f"{folder}: {name} is damaged; delete the folder and calibrate again")
    spreads = [np.zeros((n, n), np.float32) for _ in range(count)]
    for spread, triangle in zip(spreads, triangles, strict=True):
        for j, row in _rows(triangle, n):
            spread[j, j:] = row
    return Factor(order, tuple(spreads), importance)


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
