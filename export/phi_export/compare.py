"""How two models' predictions of the same text differ."""

from dataclasses import dataclass

import numpy as np

from phi_runtime.decoder import F32
from phi_runtime.sampler import log_softmax


@dataclass
class Agreement:
    """Sums over positions; p is the model held to, q the one that is measured.

    KL divergence is KL(p || q) in nats; perplexities are exp of the mean negative log-likelihood
    of the text's own next tokens; `logit_error` is the root mean square of the difference of the
    logits, each position's mean taken off, relative to that of p's logits.
    """

    tokens: int = 0
    scored: int = 0
    kld_sum: float = 0.0
    same_top: int = 0
    nll_p: float = 0.0
    nll_q: float = 0.0
    square_error: float = 0.0
    square: float = 0.0

    def add(self, p_TV: F32, q_TV: F32, targets: list[int]) -> None:
        """Count T positions; `targets` are the tokens that followed them, one fewer at a text's end."""
        log_p, log_q = log_softmax(p_TV), log_softmax(q_TV)
        self.tokens += len(p_TV)
        self.kld_sum += float((np.exp(log_p) * (log_p - log_q)).sum())
        self.same_top += int((p_TV.argmax(-1) == q_TV.argmax(-1)).sum())
        rows = np.arange(len(targets))
        self.scored += len(targets)
        self.nll_p -= float(log_p[rows, targets].sum())
        self.nll_q -= float(log_q[rows, targets].sum())
        centred = p_TV - p_TV.mean(-1, keepdims=True)
        difference = centred - (q_TV - q_TV.mean(-1, keepdims=True))
        self.square += float(np.square(centred, dtype=np.float64).sum())
        self.square_error += float(np.square(difference, dtype=np.float64).sum())

    @property
    def kld_mean(self) -> float:
        """Mean KL divergence per position, nats."""
        return self.kld_sum / self.tokens

    @property
    def top1_agreement(self) -> float:
        """Share of positions at which both find the same token most likely."""
        return self.same_top / self.tokens

    @property
    def perplexity_p(self) -> float:
        """Perplexity of the model held to."""
        return float(np.exp(self.nll_p / self.scored))

    @property
    def perplexity_q(self) -> float:
        """Perplexity of the model that is measured."""
        return float(np.exp(self.nll_q / self.scored))

    @property
    def logit_error(self) -> float:
        """Relative error of the logits."""
        return float(np.sqrt(self.square_error / self.square)) if self.square else float("inf")


def windows(tokens: list[int], length: int) -> list[list[int]]:
    """Cut a text into pieces of `length`, each to be read from an empty context; no piece of one token."""
    pieces = [tokens[i : i + length] for i in range(0, len(tokens), length)]
    return [p for p in pieces if len(p) > 1]
