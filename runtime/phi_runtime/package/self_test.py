"""A short text and what the model makes of it, kept in the bundle: an engine on a device that gives something else is
not to be used there.
"""

import numpy as np

from phi_runtime.architecture.decoder import F32
from phi_runtime.errors import VerificationError
from phi_runtime.generation.sampler import log_softmax
from phi_runtime.package.manifest import Likeliest, SelfTest

MOST_KLD = 0.2  # nats, the mean over positions; engines differ by 0.0001 to 0.03, a broken kernel by several
_TOKENS, _POSITIONS, _KEPT = 24, 4, 16


def make_self_test(tokens: list[int], logits_TV: F32) -> SelfTest:
    """Of the first tokens of a text and the logits [T, vocab_size] that were computed for it."""
    tokens = tokens[:_TOKENS]
    rows = log_softmax(logits_TV[: len(tokens)][-_POSITIONS:])
    expected = []
    for row in rows:
        order = np.argsort(-row, kind="stable")[:_KEPT]
        expected.append(Likeliest(tuple(map(int, order)), tuple(float(f"{x:.6g}") for x in row[order])))
    return SelfTest(tuple(tokens), tuple(expected))


def self_test_kld(test: SelfTest, logits_TV: F32) -> float:
    """Mean KL(recorded || computed) in nats of the last positions, the tokens that are not listed taken as one.
    logits_TV: [T, vocab_size] of the test's tokens. Infinite for logits that are no numbers.
    """
    total = 0.0
    for known, row in zip(test.expected, log_softmax(logits_TV[-len(test.expected) :]), strict=True):
        p, q = np.exp(known.logprobs), np.exp(row[list(known.tokens)])
        p, q = np.append(p, max(0.0, 1 - p.sum())), np.append(q, max(0.0, 1 - q.sum()))
        if not np.isfinite(q).all():
            return float("inf")
        total += float((p * (np.log(np.maximum(p, 1e-12)) - np.log(np.maximum(q, 1e-12)))).sum())
    return total / len(test.expected)


def check_self_test(test: SelfTest, logits_TV: F32, what: str) -> float:
    """The divergence. Raises VerificationError where it is too large to be one of rounding."""
    found = self_test_kld(test, logits_TV)
    if found <= MOST_KLD:
        return found
    raise VerificationError(
        f"{what}: does not compute the model that was exported (KL divergence {found:.2f} nats on its self-test, at "
        f"most {MOST_KLD} is rounding); use another backend, or export the bundle again"
    )
