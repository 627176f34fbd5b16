"""Metrics of two models' predictions of the same text: KL divergence, top-1 agreement, perplexity."""

import numpy as np
import numpy.typing as npt

from phi_runtime.architecture.decoder import F32
from phi_runtime.generation.sampler import log_softmax


class Agreement:
    """What was found at each position; p is the model held to, q the one that is measured.

    KL divergence is KL(p || q) in nats; perplexities are exp of the mean negative log-likelihood
    of the text's own next tokens; `logit_error` is the root mean square of the difference of the
    logits, each position's mean taken off, relative to that of p's logits.
    """

    def __init__(self) -> None:
        self._klds: list[F32] = []
        self._same: list[npt.NDArray[np.bool_]] = []
        self._positions: list[npt.NDArray[np.int64]] = []
        self._nlls: list[np.ndarray] = []  # [2, scored]: p's, q's
        self._square = self._square_error = 0.0

    def add(self, p_TV: F32, q_TV: F32, targets: list[int], skip: int = 0) -> None:
        """Count the positions of a window but for the first `skip`; `targets` are the tokens that followed each, one
        fewer at a text's end.
        """
        p_TV, q_TV, followed = p_TV[skip:], q_TV[skip:], np.asarray(targets[skip:], np.int64)
        log_p, log_q = log_softmax(p_TV), log_softmax(q_TV)
        self._klds.append(np.asarray((np.exp(log_p) * (log_p - log_q)).sum(axis=-1), np.float32))
        self._same.append(p_TV.argmax(-1) == q_TV.argmax(-1))
        self._positions.append(skip + np.arange(len(p_TV)))
        rows = np.arange(len(followed))
        self._nlls.append(-np.stack([log_p[rows, followed], log_q[rows, followed]]))
        centred = p_TV - p_TV.mean(-1, keepdims=True)
        difference = centred - (q_TV - q_TV.mean(-1, keepdims=True))
        self._square += float(np.square(centred, dtype=np.float64).sum())
        self._square_error += float(np.square(difference, dtype=np.float64).sum())

    @property
    def tokens(self) -> int:
        """Positions counted."""
        return sum(map(len, self._klds))

    @property
    def klds(self) -> F32:
        """KL divergence of every position, nats."""
        return np.concatenate(self._klds)

    @property
    def kld_mean(self) -> float:
        """Mean KL divergence per position, nats."""
        return float(self.klds.mean(dtype=np.float64))

    @property
    def kld_error(self) -> float:
        """Standard error of that mean, windows taken as the independent draws that positions are not."""
        means = [float(k.mean()) for k in self._klds]
        return float(np.std(means, ddof=1) / np.sqrt(len(means))) if len(means) > 1 else float("nan")

    @property
    def top1_agreement(self) -> float:
        """Share of positions at which both find the same token most likely."""
        return float(np.concatenate(self._same).mean())

    @property
    def perplexity_p(self) -> float:
        """Perplexity of the model held to."""
        return float(np.exp(np.concatenate(self._nlls, axis=1)[0].mean(dtype=np.float64)))

    @property
    def perplexity_q(self) -> float:
        """Perplexity of the model that is measured."""
        return float(np.exp(np.concatenate(self._nlls, axis=1)[1].mean(dtype=np.float64)))

    @property
    def logit_error(self) -> float:
        """Relative error of the logits."""
        return float(np.sqrt(self._square_error / self._square)) if self._square else float("inf")

    def by_position(self) -> list[tuple[int, int, float, float]]:
        """(first, last, mean KL divergence, top-1 agreement) of the positions from 0, 1, 3, 7, … of a window on."""
        positions, klds, same = np.concatenate(self._positions), self.klds, np.concatenate(self._same)
        found = []
        for octave in range(int(positions.max() + 1).bit_length()):
            first, last = (1 << octave) - 1, (2 << octave) - 2
            here = (positions >= first) & (positions <= last)
            if here.any():
                last = min(last, int(positions.max()))
                found.append((first, last, float(klds[here].mean(dtype=np.float64)), float(same[here].mean())))
        return found


def windows(tokens: list[int], length: int) -> list[list[int]]:
    """Cut a text into pieces of `length`, each to be read from an empty context; no piece of one token."""
    pieces = [tokens[i : i + length] for i in range(0, len(tokens), length)]
    return [p for p in pieces if len(p) > 1]
