"""From logits to a token: one sampler for every backend."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phi_runtime.architecture.decoder import F32
from phi_runtime.errors import UsageError

_NEVER = 30.0  # tokens this many nats below the likeliest are not drawn: all of them together have less than 1e-8


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the most likely one.

    The order: logit_bias and penalties, temperature, top_k, top_p, min_p. `repetition_penalty` divides the positive
    logits of tokens seen, and multiplies the negative ones (arXiv:1909.05858). `frequency_penalty` is subtracted from a
    token's logit for each time that it was drawn, `presence_penalty` once; `logit_bias` is added, by token (all three
    as OpenAI's API has them). `min_p` keeps tokens of at least this share of the likeliest's probability.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UsageError(f"temperature {self.temperature} is not between 0 and 100")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p} is not above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UsageError(f"min_p {self.min_p} is not between 0 and 1")
        if not 0.1 <= self.repetition_penalty <= 10:
            raise UsageError(
                f"repetition_penalty {self.repetition_penalty} is not between 0.1 and 10; 1 switches it off"
            )
        for name in ("frequency_penalty", "presence_penalty"):
            if not -2 <= getattr(self, name) <= 2:
                raise UsageError(f"{name} {getattr(self, name)} is not between -2 and 2")
        if not all(token >= 0 and -100 <= bias <= 100 for token, bias in self.logit_bias):
            raise UsageError("logit_bias: holds a negative token or a bias that is not between -100 and 100")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} is negative")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k} is negative; 0 switches it off")


class Sampler:
    """Draws tokens; the same seed and logits give the same tokens on every backend."""

    def __init__(self, sampling: Sampling) -> None:
        self._s = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))
        self._drawn: dict[int, int] = {}

    def draw(self, logits_V: F32, seen: Collection[int] = ()) -> int:
        """One token from the logits [vocab_size] of one position; `seen` are the distinct tokens before it."""
        token = self._draw(self._biased(logits_V), seen)
        if self._s.frequency_penalty or self._s.presence_penalty:
            self._drawn[token] = self._drawn.get(token, 0) + 1
        return token

    def _biased(self, logits_V: F32) -> F32:
        s = self._s
        if not s.logit_bias and not self._drawn:
            return logits_V
        logits_V = logits_V.copy()
        for token, bias in s.logit_bias:
            if token >= len(logits_V):
                raise UsageError(f"logit_bias: token {token} is outside the vocabulary of {len(logits_V)}")
            logits_V[token] += bias
        for token, count in self._drawn.items():
            logits_V[token] -= s.presence_penalty + count * s.frequency_penalty
        return logits_V

    def _draw(self, logits_V: F32, seen: Collection[int]) -> int:
        s = self._s
        if s.repetition_penalty != 1 and seen:
            logits_V = logits_V.copy()
            ids = np.fromiter(seen, np.int64, len(seen))
            x = logits_V[ids]
            logits_V[ids] = np.where(x > 0, x / s.repetition_penalty, x * s.repetition_penalty)
        if s.temperature == 0:
            return int(np.argmax(logits_V))
        scaled = logits_V.astype(np.float64) / s.temperature
        top = scaled.max()
        order = np.flatnonzero(scaled >= top - _NEVER)
        order = order[np.argsort(-scaled[order], kind="stable")]
        if s.top_k:
            order = order[: s.top_k]
        p = np.exp(scaled[order] - top)
        p /= p.sum()
        if s.top_p < 1:
            keep = int(np.searchsorted(np.cumsum(p), s.top_p)) + 1
            order, p = order[:keep], p[:keep]
        if s.min_p:
            keep = int(np.count_nonzero(p >= s.min_p * p[0]))
            order, p = order[:keep], p[:keep]
        point = self._random.random() * p.sum()
        return int(order[min(int(np.searchsorted(np.cumsum(p), point, side="right")), len(p) - 1)])


def log_probability(logits_V: F32, token: int) -> float:
    """Natural-log probability of one token, at the cost of one pass over the vocabulary."""
    return float(logits_V[token]) - _normaliser(logits_V)


def most_likely(logits_V: F32, count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens and their log-probabilities, the likeliest first."""
    whole = _normaliser(logits_V)
    return tuple((int(t), float(logits_V[t]) - whole) for t in np.argsort(-logits_V, kind="stable")[:count])


def _normaliser(logits_V: F32) -> float:
    top = logits_V.max()
    return float(top) + float(np.log(np.exp(logits_V - top).sum()))


def log_softmax(logits: F32) -> npt.NDArray[np.float64]:
    """Natural-log probabilities along the last axis, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    out: npt.NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return out
