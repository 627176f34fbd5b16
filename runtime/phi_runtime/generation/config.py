"""Generation options with their defaults; nothing else defines them."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from phi_runtime.generation.engine import Constraint, Policy
from phi_runtime.generation.sampler import Sampling


@dataclass(frozen=True)
class GenerationConfig(Sampling):
    """How to generate; the fields of `Sampling` say how each token is drawn.

    max_tokens: of the answer. stop: texts that end the answer and are not part of it. policy: what happens where the
    context is too small; "truncate-left" cuts the prompt's beginning, "sliding-window" also goes on in the newer half
    of the text once the context is full; what was dropped is reported. speculate: propose tokens by prompt lookup, or
    by a draft model, where that saves time; by default with a draft model alone, since the same call may then answer
    otherwise where two tokens are nearly as likely. constraint: see `Constraint`. top_logprobs: how many of the
    likeliest tokens each step names.
    """

    max_tokens: int = 512
    stop: str | Sequence[str] = ()
    policy: Policy = "reject"
    speculate: bool | None = None
    constraint: Constraint | None = None
    top_logprobs: int = 0


class Options(TypedDict, total=False):
    """Fields of `GenerationConfig` as keyword arguments; what is left out takes the default there."""

    max_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    frequency_penalty: float
    presence_penalty: float
    logit_bias: tuple[tuple[int, float], ...]
    seed: int
    stop: str | Sequence[str]
    policy: Policy
    speculate: bool | None
    constraint: Constraint | None
    top_logprobs: int
