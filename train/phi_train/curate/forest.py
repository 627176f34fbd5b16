"""A random forest as arrays: trained by scikit-learn, kept and evaluated without it (and without pickle).

Shapes: T trees, K nodes of the largest tree, N documents, D features.
"""

import io
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from phi_runtime.errors import NotFoundError, UsageError
from phi_runtime.files import write_file

F32 = npt.NDArray[np.float32]
_ARRAYS = {"feature": np.int32, "threshold": np.float32, "left": np.int32, "right": np.int32, "value": np.float32}

_MOST_BYTES = 1 << 30
# What numpy and zipfile raise for files that are damaged, encrypted, packed otherwise, or of absurd shapes.
_DAMAGED = (OSError, ValueError, KeyError, EOFError, TypeError, RuntimeError, IndexError, MemoryError)


@dataclass(frozen=True)
class Forest:
    """Of each node [T, K]: the feature that it asks for (-1 at a leaf), up to which value one goes left, where to, and
    the share of good documents at it. embedder: fingerprint of what the features are of. size: D.
    """

    feature: npt.NDArray[np.int32]
    threshold: F32
    left: npt.NDArray[np.int32]
    right: npt.NDArray[np.int32]
    value: F32
    embedder: str
    size: int

    def __call__(self, features: F32) -> F32:
        """Probability of a good document, [N], of features [N, D]."""
        out = np.zeros(len(features), np.float64)
        rows = np.arange(len(features))
        for tree in range(len(self.feature)):
            at = np.zeros(len(features), np.int32)
            while True:
                asked = self.feature[tree, at]
                inner = asked >= 0
                if not inner.any():
                    break
                goes_left = features[rows, np.maximum(asked, 0)] <= self.threshold[tree, at]
                at = np.where(inner, np.where(goes_left, self.left[tree, at], self.right[tree, at]), at)
            out += self.value[tree, at]
        return (out / len(self.feature)).astype(np.float32)

    def save(self, path: Path) -> None:
        """One .npz file."""
        raw = io.BytesIO()
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS}
        said = np.frombuffer(self.embedder.encode(), np.uint8)
        np.savez_compressed(raw, **arrays, embedder=said, size=np.array(self.size))
        write_file(path, raw.getvalue())


def from_sklearn(model: Any, embedder: str, size: int) -> Forest:
    """Of a fitted RandomForestClassifier of two classes."""
    trees = [e.tree_ for e in model.estimators_]
    most = max(t.node_count for t in trees)
    arrays: dict[str, Any] = {name: np.zeros((len(trees), most), kind) for name, kind in _ARRAYS.items()}
    for n, t in enumerate(trees):
        k = t.node_count
        leaf = t.children_left[:k] < 0
        arrays["feature"][n, :k] = np.where(leaf, -1, t.feature[:k])
        near = t.threshold[:k].astype(np.float32)  # rounded down: features of float32 fall to the same side
        arrays["threshold"][n, :k] = np.where(near > t.threshold[:k], np.nextafter(near, np.float32(-np.inf)), near)
        arrays["left"][n, :k], arrays["right"][n, :k] = np.maximum(t.children_left, 0), np.maximum(t.children_right, 0)
        arrays["value"][n, :k] = t.value[:k, 0, 1] / t.value[:k, 0].sum(1)
        arrays["feature"][n, k:] = -1
    return Forest(**arrays, embedder=embedder, size=size)


def load_forest(path: Path) -> Forest:
    """Raises NotFoundError, and UsageError for a file that is none or whose trees lead out of themselves."""
    try:
        with zipfile.ZipFile(path) as whole_file:  # what it unpacks to, before it is unpacked
            if sum(member.file_size for member in whole_file.infolist()) > _MOST_BYTES:
                raise UsageError(f"{path}: unpacks to more than {_MOST_BYTES:,} bytes; train it anew")
        with np.load(path, allow_pickle=False) as stored:
            arrays = {name: stored[name] for name in _ARRAYS}
            embedder, size = stored["embedder"].tobytes().decode(), int(stored["size"])
        embedded_length(embedder)
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file; train it with phi-train data classifier") from None
    except (*_DAMAGED, zipfile.BadZipFile, zlib.error) as e:
        raise UsageError(f"{path}: is no classifier ({type(e).__name__}); train it anew") from None
    shape = arrays["feature"].shape
    whole = len(shape) == 2 and min(shape) > 0 and all(a.shape == shape for a in arrays.values())
    whole = whole and all(arrays[name].dtype == kind for name, kind in _ARRAYS.items())
    if not whole or not _ends(arrays, size):
        raise UsageError(f"{path}: is damaged; train it anew")
    return Forest(**arrays, embedder=embedder, size=size)


def embedded_length(embedder: str) -> int:
    """Tokens of a document that a forest's embeddings are of. Raises ValueError."""
    return int(embedder.split(" ")[0])


def _ends(arrays: dict[str, Any], size: int) -> bool:
    """Every step leads on within the tree, so that each way ends."""
    inner = arrays["feature"] >= 0
    here = np.arange(inner.shape[1])[None]
    for name in ("left", "right"):
        if not ((arrays[name] > here) & (arrays[name] < inner.shape[1]))[inner].all():
            return False
    return bool((arrays["feature"] < size).all() and not inner[:, -1].any())
