"""Tokens in, tokens out: the loop around a backend. Text lives above it, in `model`."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from phi_runtime.decoder import F32
from phi_runtime.errors import ContextError, TokenError, UsageError
from phi_runtime.sampler import Sampler, Sampling, log_softmax

StopReason = Literal["stop_token", "max_tokens", "context"]


class Backend(Protocol):
    """One model on one engine, with its KV cache. Not thread-safe: one caller at a time."""

    name: str
    vocab_size: int
    context: int

    @property
    def position(self) -> int:
        """Tokens in the KV cache."""

    def forward(self, tokens: list[int], every: bool) -> F32:
        """Append tokens to the cache; logits [len(tokens), vocab_size], or [1, …] of the last."""

    def rewind(self, position: int) -> None:
        """Forget all tokens from `position` on."""

    def close(self) -> None:
        """Give back the memory; the backend is of no use afterwards."""


@dataclass(frozen=True)
class Step:
    """One generated token: its log-probability (temperature 1), when, and why it was the last."""

    token: int
    logprob: float
    seconds: float
    stop: StopReason | None


class Engine:
    """Generation over a backend."""

    def __init__(self, backend: Backend, stop_tokens: tuple[int, ...]) -> None:
        self.backend = backend
        self.stop_tokens = frozenset(stop_tokens)

    def logits(self, tokens: list[int]) -> F32:
        """Logits [len(tokens), vocab_size] of every position, from an empty cache."""
        self._check(tokens)
        self.backend.rewind(0)
        return self.backend.forward(tokens, every=True)

    def stream(self, tokens: list[int], max_tokens: int, sampling: Sampling) -> Iterator[Step]:
        """Generate after the prompt; each step's `seconds` is what that token took."""
        self._check(tokens)
        if max_tokens < 1:
            raise UsageError(f"max_tokens {max_tokens} is less than 1")
        sampler = Sampler(sampling)
        self.backend.rewind(0)
        began = time.perf_counter()
        logits_V = self.backend.forward(tokens, every=False)[-1]
        for n in range(1, max_tokens + 1):
            token = sampler.draw(logits_V)
            logprob = float(log_softmax(logits_V)[token])
            stop = self._why_stop(token, n, max_tokens)
            now = time.perf_counter()
            yield Step(token, logprob, now - began, stop)
            if stop:
                return
            began = time.perf_counter()
            logits_V = self.backend.forward([token], every=False)[-1]

    def _why_stop(self, token: int, n: int, max_tokens: int) -> StopReason | None:
        if token in self.stop_tokens:
            return "stop_token"
        if n == max_tokens:
            return "max_tokens"
        return "context" if self.backend.position >= self.backend.context else None

    def _check(self, tokens: list[int]) -> None:
        if not tokens:
            raise TokenError("the prompt is empty; give at least one token")
        low, high = int(np.min(tokens)), int(np.max(tokens))
        if low < 0 or high >= self.backend.vocab_size:
            raise TokenError(f"token {low if low < 0 else high} is outside the vocabulary of {self.backend.vocab_size}")
        if len(tokens) > self.backend.context:
            raise ContextError(
                f"the prompt has {len(tokens)} tokens, the context holds {self.backend.context}; shorten it"
            )
