"""The generation loop over a backend: tokens in, tokens out. Text is handled above it, in `model`."""

import time
from collections.abc import Generator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from phi_runtime.architecture.decoder import F32
from phi_runtime.errors import ContextError, TokenError, UsageError
from phi_runtime.generation.prompt_lookup import PromptLookup
from phi_runtime.generation.sampler import Sampler, Sampling, log_probability, most_likely

FinishReason = Literal["stop_token", "stop_text", "max_tokens", "context"]
Policy = Literal["reject", "truncate-left", "sliding-window"]
CHUNK = 256  # tokens of a prompt that are read at a time; bounds what an engine reserves for them
POLICIES: tuple[Policy, ...] = ("reject", "truncate-left", "sliding-window")


class Backend(Protocol):
    """One model on one engine, with its KV cache. Not thread-safe: one caller at a time."""

    name: str
    vocab_size: int
    context: int

    @property
    def position(self) -> int:
        """Tokens in the KV cache."""

    def forward(self, tokens: list[int], all_logits: bool) -> F32:
        """Append tokens to the cache; logits [len(tokens), vocab_size], or [1, …] of the last."""

    def trim(self, position: int) -> None:
        """Forget all tokens from `position` on."""

    def close(self) -> None:
        """Give back the memory; the backend is of no use afterwards."""


class Constraint(Protocol):
    """What an answer must keep to, such as a grammar."""

    def mask(self, logits_V: F32) -> F32:
        """The logits, -inf where a token would break it."""

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""


@dataclass(frozen=True)
class Step:
    """One generated token.

    logprob: at temperature 1. seconds: since the step before, or since the call. reused: of the first step, how many
    of the prompt's tokens were still in the cache. dropped: tokens that the context policy took out before this one.
    top: the likeliest tokens and their logprobs, as many as were asked for.
    """

    token: int
    logprob: float
    seconds: float
    finish_reason: FinishReason | None
    reused: int = 0
    dropped: int = 0
    top: tuple[tuple[int, float], ...] = ()


class Engine:
    """Generation over a backend, with prefix caching: only what the last text did not begin with is prefilled.

    A prompt is read in pieces; between them another thread or a signal may set `cancelled` to end the stream. One that
    goes beyond LongRoPE's `crossover` is read at once: what came before it has to be read again with what follows.
    """

    def __init__(self, backend: Backend, stop_tokens: tuple[int, ...], crossover: int | None = None) -> None:
        self.backend = backend
        self.stop_tokens = frozenset(stop_tokens)
        self.cached_tokens: list[int] = []  # what the cache holds; nothing, where a call was broken off in the backend
        self.cancelled = False
        self.draft: Engine | None = None  # a quicker model of the same vocabulary, to propose tokens with
        self._crossover = crossover

    def forget(self) -> None:
        """Empty the cache."""
        self.cached_tokens = []
        self.backend.trim(0)

    def logits(self, tokens: list[int]) -> F32:
        """Logits [len(tokens), vocab_size] of every position, from an empty cache."""
        self.check(tokens)
        self.forget()
        return self._forward(tokens, all_logits=True)

    def score(self, tokens: list[int], start: int) -> tuple[list[float], bool]:
        """Natural-log probabilities of tokens[start:], each after all before it, and whether all are the likeliest.

        What comes before `start` stays in the cache for the next call with the same beginning; a cache that holds more
        or less than that is read anew, so that scores do not depend on the order of calls. Raises UsageError for a
        start that leaves nothing before it or behind it and where `cancelled` was set meanwhile, the errors of `check`.
        """
        self.check(tokens)
        if not 1 <= start < len(tokens):
            raise UsageError(f"start {start} is not between 1 and {len(tokens) - 1}")
        held = start - 1  # the last token before `start` is read again: its logits are wanted
        if self._crossover is not None and len(tokens) - 1 > self._crossover:
            rows = self.logits(tokens[:-1])[held:]
            self.forget()
        else:
            if self.cached_tokens != tokens[:held] or self.backend.position != held:
                self.forget()
                self.cancelled = False
                self._read(tokens[:held])
                if self.cancelled:
                    raise UsageError("the call was cancelled, or the model closed, before it was done")
            rows = self._forward(tokens[held:-1], all_logits=True)
            self._rewind(held)
        wanted = tokens[start:]
        found = [log_probability(row, token) for row, token in zip(rows, wanted, strict=True)]
        return found, bool(np.array_equal(rows.argmax(axis=1), wanted))

    def stream(
        self,
        tokens: list[int],
        max_tokens: int,
        sampling: Sampling,
        policy: Policy = "reject",
        speculate: bool = True,
        constraint: Constraint | None = None,
        top_logprobs: int = 0,
    ) -> Generator[Step, None, None]:
        """Generate after the prompt. The cache keeps what was read, for the next call.

        A stream that is `cancelled` while it reads the prompt ends without a step.
        """
        tokens, dropped = self.fit(tokens, max_tokens, policy)
        if not 0 <= top_logprobs <= self.backend.vocab_size:
            raise UsageError(f"top_logprobs {top_logprobs} is not between 0 and the vocabulary's size")
        sampler = Sampler(sampling)
        seen = set(tokens) if sampling.repetition_penalty != 1 else set()
        lookup = (
            PromptLookup(tokens, self._drafted if self.draft else None) if speculate and constraint is None else None
        )
        began, passed = time.perf_counter(), 0.0
        self.cancelled = False
        reused = self._rewind_to_shared(tokens)
        rows, proposed, at = self._read(tokens[reused:]), list[int](), 0
        if self.cancelled:
            return
        for n in range(1, max_tokens + 1):
            logits_V = rows[at] if constraint is None else constraint.mask(rows[at])
            token = sampler.draw(logits_V, seen)
            accepted = at < len(proposed) and token == proposed[at]
            full = len(self.cached_tokens) - (len(proposed) - at) >= self.backend.context and policy != "sliding-window"
            stop = self._why_stop(token, n, max_tokens, full)
            now = time.perf_counter()
            top = most_likely(rows[at], top_logprobs) if top_logprobs else ()
            step = Step(token, log_probability(rows[at], token), now - began, stop, reused, dropped, top)
            if stop or not accepted:
                self._rewind(len(self.cached_tokens) - (len(proposed) - at))
            yield step
            if stop:
                return
            began, reused, dropped = time.perf_counter(), 0, 0
            if sampling.repetition_penalty != 1:
                seen.add(token)
            if constraint is not None:
                constraint.accept(token)
            if lookup is not None:
                lookup.push(token)
            if accepted:
                at += 1
                continue
            if lookup is not None and n > 1:
                lookup.record(len(proposed), at, passed)
            if len(self.cached_tokens) >= self.backend.context:
                dropped = self._slide()
            most = min(max_tokens - n, self.backend.context - len(self.cached_tokens)) - 1
            started = time.perf_counter()
            proposed, at = lookup.propose(most) if lookup is not None else [], 0
            rows = self._forward([token, *proposed], all_logits=True)
            passed = time.perf_counter() - started

    def _drafted(self, tokens: list[int], count: int) -> list[int]:
        """What the draft model would say; nothing beyond its context."""
        if self.draft is None or len(tokens) + count > self.draft.backend.context:
            return []
        return [s.token for s in self.draft.stream(tokens, count, Sampling(), speculate=False)]

    def fit(self, tokens: list[int], max_tokens: int, policy: Policy) -> tuple[list[int], int]:
        """The prompt, and how many tokens were cut from its beginning so that it and its answer fit.

        Raises the errors of `fits`.
        """
        if max_tokens < 1:
            raise UsageError(f"max_tokens {max_tokens} is less than 1")
        self.fits(tokens, policy)
        context = self.backend.context
        if policy == "reject" or len(tokens) + max_tokens <= context:
            return list(tokens), 0
        # An answer that wants more than half of the context does not displace more of the prompt than that.
        room = max(context - max_tokens, context // 2) if policy == "truncate-left" else context
        cut = max(0, len(tokens) - max(1, room))
        return list(tokens[cut:]), cut

    def _slide(self) -> int:
        """Forget the older half and read the newer again, at the positions that it has then."""
        kept = self.cached_tokens[-max(1, self.backend.context // 2) :]
        dropped = len(self.cached_tokens) - len(kept)
        self.forget()
        self._forward(kept, all_logits=False)
        return dropped

    def _rewind_to_shared(self, tokens: list[int]) -> int:
        """Keep of the cache what these tokens begin with, but for the last of them; how many that are."""
        if self.backend.position != len(self.cached_tokens):  # a call was broken off, or went past us
            self.forget()
        most = min(len(self.cached_tokens), len(tokens) - 1)
        shared = next((i for i in range(most) if self.cached_tokens[i] != tokens[i]), most)
        self._rewind(shared)
        return shared

    def _rewind(self, position: int) -> None:
        if position != self.backend.position or position != len(self.cached_tokens):
            self.cached_tokens = self.cached_tokens[:position]
            self.backend.trim(position)

    def _read(self, tokens: list[int]) -> F32:
        """Append tokens a chunk at a time, until it is done or cancelled; the last one's logits [1, vocab_size]."""
        rows = np.empty((0, 0), np.float32)
        crosses = self._crossover is not None and len(self.cached_tokens) <= self._crossover < len(
            self.cached_tokens
        ) + len(tokens)
        step = len(tokens) if crosses else CHUNK
        for start in range(0, len(tokens), step):
            rows = self._forward(tokens[start : start + step], all_logits=False)
            if self.cancelled:
                break
        return rows

    def _forward(self, tokens: list[int], all_logits: bool) -> F32:
        held, self.cached_tokens = self.cached_tokens, []  # until it is done
        rows = self.backend.forward(tokens, all_logits)
        held += tokens
        self.cached_tokens = held
        return rows

    def _why_stop(self, token: int, n: int, max_tokens: int, full: bool) -> FinishReason | None:
        if token in self.stop_tokens:
            return "stop_token"
        if n == max_tokens:
            return "max_tokens"
        return "context" if full else None

    def fits(self, tokens: list[int], policy: Policy) -> None:
        """As `check`, but for what the context policy will make fit. Raises UsageError for an unknown policy."""
        if policy not in POLICIES:
            raise UsageError(f"no context policy {policy!r}; choose from {', '.join(POLICIES)}")
        self.check(tokens if policy == "reject" else tokens[-self.backend.context :])

    def check(self, tokens: list[int]) -> None:
        """Raise TokenError for an empty prompt or foreign tokens, ContextError for one that does not fit."""
        if not tokens:
            raise TokenError("the prompt is empty; give at least one token")
        low, high = int(np.min(tokens)), int(np.max(tokens))
        if low < 0 or high >= self.backend.vocab_size:
            raise TokenError(f"token {low if low < 0 else high} is outside the vocabulary of {self.backend.vocab_size}")
        if len(tokens) > self.backend.context:
            raise ContextError(
                f"the prompt has {len(tokens)} tokens, the context holds {self.backend.context}; shorten it, or choose "
                f"another context policy ({', '.join(POLICIES[1:])})"
            )
