"""From logits to a token: one sampler for every backend."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from phi_runtime.decoder import F32
from phi_runtime.errors import UsageError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the most likely one."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise UsageError(f"temperature {self.temperature} is not between 0 and 100")
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p {self.top_p} is not above 0 and at most 1")
        if self.seed < 0:
            raise UsageError(f"seed {self.seed} is negative")
        if self.top_k < 0:
            raise UsageError(f"top_k {self.top_k} is negative; 0 switches it off")


class Sampler:
    """Draws tokens; the same seed and logits give the same tokens on every backend."""

    def __init__(self, sampling: Sampling) -> None:
        self._s = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed))

    def draw(self, logits_V: F32) -> int:
        """One token from the logits [vocab_size] of one position."""
        s = self._s
        if s.temperature == 0:
            return int(np.argmax(logits_V))
        scaled = logits_V.astype(np.float64) / s.temperature
        order = np.argsort(-scaled, kind="stable")
        if s.top_k:
            order = order[: s.top_k]
        p = np.exp(scaled[order] - scaled[order[0]])
        p /= p.sum()
        if s.top_p < 1:
            keep = int(np.searchsorted(np.cumsum(p), s.top_p)) + 1
            order, p = order[:keep], p[:keep]
        point = self._random.random() * p.sum()
        return int(order[min(int(np.searchsorted(np.cumsum(p), point, side="right")), len(p) - 1)])


def log_softmax(logits: F32) -> npt.NDArray[np.float64]:
    """Natural-log probabilities along the last axis, in float64."""
    x = logits.astype(np.float64)
    x -= x.max(axis=-1, keepdims=True)
    out: npt.NDArray[np.float64] = x - np.log(np.exp(x).sum(axis=-1, keepdims=True))
    return out
