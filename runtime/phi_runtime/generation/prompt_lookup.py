"""Speculative decoding by 3-gram prompt lookup, or by a draft model.

Proposed is what followed the last three tokens earlier in the text. Proposals are checked against the sampler in one
wider forward pass (arXiv:2211.17192; by lookup: arXiv:2304.04487). Engines round a wider pass otherwise, and when one
is tried depends on the clock: answers may part where two tokens are nearly as likely.
"""

from collections.abc import Callable

_GRAM = 3  # tokens that must have been seen before, in this order
_SHORTEST, _LONGEST = 3, 24  # tokens of a proposal
_PATIENCE = 6  # rounds that are judged together
_REST = 32  # tokens without proposals after rounds that lost time; doubles each time

Draft = Callable[[list[int], int], list[int]]  # the text so far and how many tokens to propose at most


class PromptLookup:
    """An index of the text's n-grams, and a measurement of whether proposals pay here."""

    def __init__(self, tokens: list[int], draft: Draft | None = None) -> None:
        self._tokens: list[int] = []
        self._draft = draft
        self._after: dict[tuple[int, ...], int] = {}
        self._length = _SHORTEST
        self._single: float | None = None  # seconds of a pass over one token
        self._rounds: list[tuple[int, float]] = []  # tokens that each checking pass gave, and its seconds
        self._rest, self._pause = _REST, 0
        for token in tokens:
            self.push(token)

    def push(self, token: int) -> None:
        """The text goes on with this token."""
        t = self._tokens
        if len(t) >= _GRAM:  # indexed one late, so that the last n-gram finds an earlier place than itself
            self._after[tuple(t[-_GRAM:])] = len(t)
        t.append(token)

    def propose(self, most: int) -> list[int]:
        """Up to `most` tokens that may follow, none where nothing was found or proposals do not pay."""
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

    def record(self, proposed: int, accepted: int, seconds: float) -> None:
        """A pass over `proposed` tokens and one more took `seconds`; the sampler accepted `accepted` of them."""
        if not proposed:
            self._single = seconds if self._single is None else 0.8 * self._single + 0.2 * seconds
            return
        self._length = min(_LONGEST, 2 * self._length) if accepted == proposed else max(_SHORTEST, accepted + 1)
        self._rounds = [*self._rounds[1 - _PATIENCE :], (accepted + 1, seconds)]
        if len(self._rounds) == _PATIENCE and self._single is not None:
            tokens, spent = (sum(column) for column in zip(*self._rounds, strict=True))
            if spent > tokens * self._single:
                self._pause, self._rest, self._rounds = self._rest, 2 * self._rest, []
