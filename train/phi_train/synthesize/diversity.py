"""How diverse documents are: what phi-1's authors name as open (2306.11644, section 7), in four figures."""

import zlib
from collections import Counter

import numpy as np

from phi_runtime.contract import Contract
from phi_train.curate.config import MinHash
from phi_train.curate.minhash import Signer, duplicates
from phi_train.curate.ngrams import words
from phi_train.synthesize.overlap import grams

_SAMPLE = 20_000  # documents that n-grams and the compression ratio are taken of
_OPENING = 4  # words
_SHOWN = 5


class Opening(Contract, frozen=True):
    """The first words of documents, and the share of documents that begin so."""

    words: str
    share: float


class Diversity(Contract, frozen=True):
    """distinct: the share of different n-grams of words among all, for n of 1 to 4, over the first 20,000 documents.

    compressed: bytes after zlib by bytes before (less is more repetitive). near_duplicates: documents that are like an
    earlier one (MinHash, 14x8 over 5 words). openings: the most frequent first four words. topics: documents of each;
    least and most are of them.
    """

    documents: int
    words: int
    distinct: tuple[float, ...]
    compressed: float
    near_duplicates: int
    openings: tuple[Opening, ...]
    topics: int
    least: int
    most: int


class DiversityCounter:
    """Fed with documents; memory: of 20,000 documents' n-grams, and 112 bytes for each further one."""

    def __init__(self) -> None:
        self._signer = Signer(MinHash())
        self._signatures: list[np.ndarray] = []
        self._grams: list[set[int]] = [set() for _ in range(4)]
        self._totals = [0] * 4
        self._zlib = zlib.compressobj(6)
        self._raw = self._packed = self._words = 0
        self._openings: Counter[str] = Counter()
        self.topics: Counter[str] = Counter()

    @property
    def documents(self) -> int:
        """So far."""
        return len(self._signatures)

    def add(self, text: str, topic: str) -> None:
        """A document."""
        found = words(text)
        self._words += len(found)
        self.topics[topic] += 1
        self._openings[" ".join(found[:_OPENING])] += 1
        if len(self._signatures) < _SAMPLE:
            for n in range(4):
                self._totals[n] += max(0, len(found) - n)
                self._grams[n].update(grams(found, n + 1))
            raw = text.encode()
            self._raw += len(raw)
            self._packed += len(self._zlib.compress(raw))
        self._signatures.append(self._signer(text))

    def result(self, asked: int) -> Diversity:
        """asked: topics that documents were drawn from; those without a document count as least."""
        packed = self._packed + len(self._zlib.copy().flush())
        count = len(self._signatures)
        marked = duplicates([np.stack(self._signatures)]) if count else np.zeros(0, bool)
        return Diversity(
            documents=count,
            words=self._words,
            distinct=tuple(len(g) / t if t else 0.0 for g, t in zip(self._grams, self._totals, strict=True)),
            compressed=packed / self._raw if self._raw else 0.0,
            near_duplicates=int(marked.sum()),
            openings=tuple(Opening(o, n / count) for o, n in self._openings.most_common(_SHOWN)),
            topics=len(self.topics),
            least=0 if len(self.topics) < asked else min(self.topics.values(), default=0),
            most=max(self.topics.values(), default=0),
        )
