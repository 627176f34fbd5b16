"""What calibration keeps on disk: arrays, and the factors of error feedback as the rows of a triangle in float16."""

from functools import lru_cache
from pathlib import Path

import numpy as np

from phi_export.feedback import Factor
from phi_runtime.errors import CheckpointError


def save_factor(folder: Path, name: str, factor: Factor) -> None:
    """Keep a factor as NAME-spread.npy, NAME-importance.npy and NAME-order.npy."""
    n = len(factor.order)
    triangle = np.empty(n * (n + 1) // 2, np.float16)
    at = 0
    for j in range(n):
        triangle[at : at + n - j] = factor.spread[j, j:]
        at += n - j
    save_array(folder / f"{name}-spread.npy", triangle)
    save_array(folder / f"{name}-importance.npy", factor.importance)
    save_array(folder / f"{name}-order.npy", factor.order)


@lru_cache(maxsize=1)  # parts of a matrix share it, and two of the widest are much memory
def load_factor(folder: Path, name: str) -> Factor:
    """The factor kept by that name. Raises CheckpointError."""
    order, triangle = load_array(folder / f"{name}-order.npy"), load_array(folder / f"{name}-spread.npy")
    importance = load_array(folder / f"{name}-importance.npy")
    n = len(order)
    whole = triangle.shape == (n * (n + 1) // 2,) and importance.shape == (n,) and bool((importance > 0).all())
    if not whole or not np.array_equal(np.sort(order), np.arange(n)):
        raise CheckpointError(f"{folder}: {name} is damaged; delete the folder and calibrate again")
    spread = np.zeros((n, n), np.float32)
    at = 0
    for j in range(n):
        spread[j, j:] = triangle[at : at + n - j]
        at += n - j
    return Factor(order, spread, importance)


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
