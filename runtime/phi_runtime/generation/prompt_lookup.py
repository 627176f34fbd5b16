"""PromptLookup for speculative decoding: what followed these tokens last time in the text, or what a draft model says.

A guess costs a wider forward pass and is checked against the sampler, so it changes speed and never the answer
(arXiv:2211.17192; by lookup instead of a model: arXiv:2304.04487).
"""

from collections.abc import Callable

_GRAM = 3  # tokens that must have been seen before, in this order
_SHORTEST, _LONGEST = 3, 24  # tokens of a guess
_PATIENCE = 6  # rounds that are judged together
_REST = 32  # tokens without guesses after rounds that lost time; doubles each time

Draft = Callable[[list[int], int], list[int]]  # the text so far and how many tokens to guess at most


class PromptLookup:
    """The text so far as an index of its n-grams, and a judgement of whether guessing pays here."""

    def __init__(self, tokens: list[int], draft: Draft | None = None) -> None:
        self._tokens: list[int] = []
        self._draft = draft
        self._after: dict[tuple[int, ...], int] = {}
        self._length = _SHORTEST
        self._single: float | None = None  # seconds of a pass over one token
        self._rounds: list[tuple[int, float]] = []  # tokens that came out of each guessing pass, and its seconds
        self._rest, self._pause = _REST, 0
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """The text goes on with this token."""
        t = self._tokens
        if len(t) >= _GRAM:  # indexed one late, so that the last n-gram finds an earlier place than itself
            self._after[tuple(t[-_GRAM:])] = len(t)
        t.append(token)

    def guess(self, most: int) -> list[int]:
        """Up to `most` tokens that may follow, none where nothing was found or guessing does not pay."""
        if self._pause:
            self._pause -= 1
            return []
        if self._single is None or most < 1:
            return []
        length = min(self._length, most)
        start = self._after.get(tuple(self._tokens[-_GRAM:]))
        if start is not None:
            return self._tokens[start : start + length]
        return [] if self._draft is None else self._draft(self._tokens, length)

    def record(self, guessed: int, right: int, seconds: float) -> None:
        """Guessing so many tokens and a pass over them and one more took so long, and `right` of them were."""
        if not guessed:
            self._single = seconds if self._single is None else 0.8 * self._single + 0.2 * seconds
            return
        self._length = min(_LONGEST, 2 * self._length) if right == guessed else max(_SHORTEST, right + 1)
        self._rounds = [*self._rounds[1 - _PATIENCE :], (right + 1, seconds)]
        if len(self._rounds) == _PATIENCE and self._single is not None:
            tokens, spent = (sum(column) for column in zip(*self._rounds, strict=True))
            if spent > tokens * self._single:
                self._pause, self._rest, self._rounds = self._rest, 2 * self._rest, []
