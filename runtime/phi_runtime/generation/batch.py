"""Several texts at once, for evaluation: an engine reads its weights once for a token of each."""

import time
from collections import deque
from collections.abc import Callable
from typing import Protocol, runtime_checkable

from phi_runtime.architecture.decoder import F32
from phi_runtime.generation.engine import FinishReason, Step
from phi_runtime.generation.sampler import Sampler, Sampling, log_probability, most_likely


class BackendBatch(Protocol):
    """Texts side by side, each in a row with a cache of its own."""

    def read(self, row: int, tokens: list[int]) -> F32:
        """Begin a text in a row; the logits [vocab_size] after it."""

    def step(self, tokens: dict[int, int]) -> dict[int, F32]:
        """Append a token to some rows; the logits [vocab_size] of each."""

    def close(self) -> None:
        """Give back the memory."""


@runtime_checkable
class SupportsBatches(Protocol):
    """A backend that has them."""

    def batch(self, rows: int, slots: int) -> BackendBatch:
        """Room for `rows` texts of `slots` tokens each, answers included."""


class _Row:
    """A text under way."""

    def __init__(self, number: int, tokens: list[int], sampling: Sampling) -> None:
        self.number, self.count, self.began = number, 0, time.perf_counter()
        self.seen = set(tokens) if sampling.repetition_penalty != 1 else set()
        self.sampler = Sampler(sampling)


def generate(
    batch: BackendBatch,
    rows: int,
    prompts: list[list[int]],
    max_tokens: int,
    sampling: Sampling,
    stop_tokens: frozenset[int],
    top_logprobs: int,
    heard: Callable[[int, Step], bool],
) -> None:
    """Generate after each prompt, `rows` of them at a time; one that ends makes room for the next.

    `heard` is told each step of prompt number n, and says whether it is to go on.
    """
    waiting, going, logits = deque(enumerate(prompts)), dict[int, _Row](), dict[int, F32]()
    while waiting or going:
        for row in range(rows):
            if row not in going and waiting:
                number, tokens = waiting.popleft()
                going[row] = _Row(number, tokens, sampling)
                logits[row] = batch.read(row, tokens)
        drawn = {}
        for row, text in list(going.items()):
            token = text.sampler.draw(logits[row], text.seen)
            text.count += 1
            stop: FinishReason | None = "max_tokens" if text.count == max_tokens else None
            stop = "stop_token" if token in stop_tokens else stop
            now = time.perf_counter()
            top = most_likely(logits[row], top_logprobs) if top_logprobs else ()
            step = Step(token, log_probability(logits[row], token), now - text.began, stop, top=top)
            text.began = now
            if sampling.repetition_penalty != 1:
                text.seen.add(token)
            if heard(text.number, step) and stop is None:
                drawn[row] = token
            else:
                del going[row]
        if drawn:
            logits = batch.step(drawn)
