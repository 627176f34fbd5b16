"""Which texts share n words in a row with an evaluation set (phi-1, section 5.1: 13 of them)."""

import re

_WORD = re.compile(r"\w+")


def words(text: str) -> list[str]:
    """Words and numbers in lower case."""
    return _WORD.findall(text.lower())


class NgramIndex:
    """The n-grams of some items' texts; what is found is exact."""

    def __init__(self, items: list[tuple[str, ...]], length: int) -> None:
        self.length = length
        self._ids: dict[str, int] = {}
        self._items: dict[tuple[int, ...], set[int]] = {}
        self.without = set(range(len(items)))  # items of fewer words
        for number, texts in enumerate(items):
            for text in texts:
                ids = [self._ids.setdefault(w, len(self._ids)) for w in words(text)]
                for at in range(len(ids) - length + 1):
                    self._items.setdefault(tuple(ids[at : at + length]), set()).add(number)
                    self.without.discard(number)
        self._spelled = list(self._ids)

    def find(self, text: str) -> dict[int, str]:
        """Items that share an n-gram with a text, and the first such n-gram of each."""
        found: dict[int, str] = {}
        run: list[int] = []
        for word in words(text):
            number = self._ids.get(word)
            if number is None:  # no item has it
                run = []
                continue
            run.append(number)
            if len(run) >= self.length:
                for item in self._items.get(tuple(run[-self.length :]), ()):
                    if item not in found:
                        found[item] = " ".join(self._spelled[n] for n in run[-self.length :])
        return found
