"""A short text and what the model makes of it, kept in the bundle: an engine on a device that gives something else is
not to be used there.
"""

import numpy as np

from phi_runtime.architecture.decoder import F32
from phi_runtime.errors import VerificationError
from phi_runtime.generation.sampler import log_softmax
from phi_runtime.package.manifest import Likeliest, SelfTest

# Nats, the mean over positions. On SmolLM2-135M engines differ by 0.003 to 0.006, a cache of 4 bits by 0.135; a RoPE
# base of 14,678 in place of 100,000 gives 0.174, exchanged matrices 7.
MOST_KLD, MOST_KLD_OF_Q4_CACHES = 0.05, 0.3
_TOKENS, _POSITIONS, _KEPT = 128, 8, 16


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


def check_self_test(test: SelfTest, logits_TV: F32, what: str, kv: str | None = None) -> float:
    """The divergence. kv: the type of the cache. Raises VerificationError where it is too large for rounding."""
    found = self_test_kld(test, logits_TV)
    most = MOST_KLD_OF_Q4_CACHES if kv is not None and kv.startswith("q4") else MOST_KLD
    if found <= most:
        return found
    raise VerificationError(
        f"{what}: does not compute the model that was exported (KL divergence {found:.2f} nats on its self-test, at "
        f"most {most} is rounding); use another backend, or export the bundle again"
    )
