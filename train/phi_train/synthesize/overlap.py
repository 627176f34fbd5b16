"""How much texts have in common: ROUGE-2 on words, as TinyStories measures memorisation (2305.07759, section 4.3)."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise

from phi_train.curate.ngrams import words


def bigrams(text: str) -> Counter[tuple[str, str]]:
    """Pairs of neighbouring words."""
    return Counter(pairwise(words(text)))


def grams(found: list[str], n: int) -> Iterator[int]:
    """The hashes of n words in a row, of this process."""
    return (hash(tuple(found[i : i + n])) for i in range(len(found) - n + 1))


def precision(text: str, reference: str) -> float:
    """The share of a text's bigrams that a reference has."""
    found = bigrams(text)
    total = found.total()
    return (found & bigrams(reference)).total() / total if total else 0.0


def f_score(one: str, other: str) -> float:
    """The harmonic mean of both shares, 0 to 1."""
    a, b = bigrams(one), bigrams(other)
    common = (a & b).total()
    return 2 * common / (a.total() + b.total()) if common else 0.0


class Nearest:
    """The texts that a text may have been copied from. Memory: some 100 bytes a bigram."""

    def __init__(self, texts: Iterable[str]) -> None:
        self._counts: list[Counter[tuple[str, str]]] = []
        self._having: dict[tuple[str, str], list[int]] = defaultdict(list)
        for text in texts:
            found = bigrams(text)
            for pair in found:
                self._having[pair].append(len(self._counts))
            self._counts.append(found)

    def precision(self, text: str) -> float:
        """The largest share of a text's bigrams that one of the texts has."""
        found = bigrams(text)
        total = found.total()
        if not total:
            return 0.0
        common: Counter[int] = Counter()
        for pair, count in found.items():
            for n in self._having.get(pair, ()):
                common[n] += min(count, self._counts[n][pair])
        return max(common.values(), default=0) / total
