"""Near duplicates by MinHash: signatures of documents, and which of them to leave out (Broder 1997).

N documents, W words, B buckets, H hashes of a bucket.
"""

import hashlib

import numpy as np
import numpy.typing as npt

from phi_train.curate.config import MinHash
from phi_train.curate.ngrams import words

_U64 = npt.NDArray[np.uint64]
_MOST_WORDS = 1 << 20  # whose hashes are kept
_AT_A_TIME = 4096  # n-grams
_EMPTY = np.uint64(0xFFFFFFFFFFFFFFFF)


class Signer:
    """Texts to signatures, uint64 [B]: two texts have a bucket in common the likelier the more n-grams they share."""

    def __init__(self, settings: MinHash) -> None:
        self._s = settings
        draw = np.random.Generator(np.random.PCG64(settings.seed))
        count = settings.buckets * settings.hashes
        self._factors = draw.integers(0, 1 << 63, count, np.uint64) * np.uint64(2) + np.uint64(1)
        self._mix = draw.integers(0, 1 << 63, settings.ngram, np.uint64) * np.uint64(2) + np.uint64(1)
        self._bucket = draw.integers(0, 1 << 63, settings.hashes, np.uint64) * np.uint64(2) + np.uint64(1)
        self._known: dict[str, int] = {}

    def __call__(self, text: str) -> _U64:
        """A text of fewer words than an n-gram is one n-gram; those without words are all alike."""
        found = np.array([self._hash(w) for w in words(text)], np.uint64)
        if not len(found):
            return np.full(self._s.buckets, _EMPTY)
        length = min(self._s.ngram, len(found))
        grams = np.zeros(len(found) - length + 1, np.uint64)
        for n in range(length):
            grams = (grams ^ found[n : n + len(grams)]) * self._mix[n]
            grams ^= grams >> np.uint64(29)
        grams = np.unique(grams)
        least = np.full(len(self._factors), _EMPTY)
        for start in range(0, len(grams), _AT_A_TIME):
            part = grams[start : start + _AT_A_TIME]
            np.minimum(least, (part[:, None] * self._factors).min(0), out=least)
        out: _U64 = (least.reshape(self._s.buckets, -1) * self._bucket).sum(1, dtype=np.uint64)
        return out

    def _hash(self, word: str) -> int:
        known = self._known.get(word)
        if known is None:
            if len(self._known) >= _MOST_WORDS:
                self._known.clear()
            known = int.from_bytes(hashlib.blake2b(word.encode(), digest_size=8).digest(), "little")
            self._known[word] = known
        return known


def duplicates(parts: list[_U64]) -> npt.NDArray[np.bool_]:
    """Which documents of all shards to leave out: of each cluster all but the first. parts: [N, B] of each shard.

    Clusters are what is connected by equal buckets. Memory beside these: 40 bytes a document.
    """
    count = sum(len(p) for p in parts)
    first = np.arange(count)  # of each document's cluster so far, or a step on the way there
    for bucket in range(parts[0].shape[1] if parts else 0):
        values = np.concatenate([p[:, bucket] for p in parts])
        order = np.argsort(values, kind="stable")
        same = np.nonzero(values[order][1:] == values[order][:-1])[0]
        for one, other in zip(order[same].tolist(), order[same + 1].tolist(), strict=True):
            _join(first, one, other)
    return np.fromiter((_root(first, n) != n for n in range(count)), bool, count)


def _root(first: npt.NDArray[np.int64], n: int) -> int:
    while first[n] != n:
        first[n] = n = int(first[first[n]])  # half of the way is cut for the next
    return n


def _join(first: npt.NDArray[np.int64], one: int, other: int) -> None:
    a, b = _root(first, one), _root(first, other)
    first[max(a, b)] = min(a, b)
