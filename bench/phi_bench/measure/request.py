"""What `phi-bench run` is asked for, and the settings that come of it."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from phi_bench.records import Settings
from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.errors import PhiError, UsageError
from phi_runtime.package.open import open_package

PROMPTS = (
    'def read_lines(path):\n    """Return the lines of',
    "class Queue:\n    def __init__(self",
    "import os\nimport sys\n\n\ndef main(",
)
_PROMPT, _DECODE, _SPARE = 256, 64, 8  # tokens
_MOST_DEPTH = 1 << 20


@dataclass
class Progress:
    """Where what happens is told. estimated: seconds of the whole, before it begins. step: a process is about to start:
    how many are done, of how many, and what it is.
    """

    estimated: Callable[[float, int], None] = field(default=lambda seconds, processes: None)
    step: Callable[[int, int, str], None] = field(default=lambda done, of, what: None)
    note: Callable[[str], None] = field(default=lambda what: None)


@dataclass(frozen=True)
class Request:
    """What is to be measured. models: paths, each with `@adapter` or `@adapter:engine` where one is wanted, and `name=`
    before it where its own will not do.

    prompt_tokens, decode_tokens: 256 and 64 where nobody said, or fewer where a model's context holds no more.
    """

    models: tuple[str, ...]
    against: Path | None = None
    text: Path | None = None
    tokens: int = 4096
    rounds: int = 5
    prompt_tokens: int | None = None
    decode_tokens: int | None = None
    depths: tuple[int, ...] = ()
    sustained_s: float = 0
    threads: int | None = None
    kv: str | None = None
    timeout_s: float = 900
    memory_limit: int | None = None
    force: bool = False


def settings(request: Request, paths: list[Path], progress: Progress) -> Settings:
    """With the numbers of tokens that were left to us. Raises UsageError for what cannot be measured."""
    if (request.against is None) != (request.text is None):
        raise UsageError("quality needs both --against CKPT and --text FILE")
    if request.text is not None and request.text.is_file() and not request.text.stat().st_size:
        raise UsageError(f"--text {request.text}: is empty; give a text")
    held = min((c for path in paths if (c := most_context(path))), default=_MOST_DEPTH)
    prompt_tokens = request.prompt_tokens or min(_PROMPT, held // 2)
    decode_tokens = request.decode_tokens or min(_DECODE, max(1, held - prompt_tokens - _SPARE))
    if None in (request.prompt_tokens, request.decode_tokens) and held < _PROMPT + _DECODE + _SPARE:
        progress.note(f"a context holds {held} tokens only: prompts of {prompt_tokens}, {decode_tokens} generated")
    if min(request.rounds, prompt_tokens - 1, decode_tokens) < 1:
        raise UsageError("a run needs a round, a prompt of two tokens and a token to generate at least")
    at = prompt_tokens
    for depth in request.depths:
        if not at + decode_tokens < depth < _MOST_DEPTH:
            raise UsageError(
                f"--depths {depth}: each has to be more than {decode_tokens} tokens beyond the one before it, "
                f"the first beyond the prompt of {prompt_tokens}, after which tokens are measured in any case"
            )
        at = depth
    return Settings(
        rounds=request.rounds,
        prompt_tokens=prompt_tokens,
        decode_tokens=decode_tokens,
        depths=request.depths,
        timeout_s=request.timeout_s,
        sustained_s=request.sustained_s,
        quality_tokens=request.tokens if request.against is not None else None,
        text_sha256=None if request.text is None else hashlib.sha256(request.text.read_bytes()).hexdigest(),
        memory_limit=request.memory_limit,
        prompts=PROMPTS,
    )


def context(s: Settings) -> int:
    """Tokens that have to fit."""
    needed = max(s.prompt_tokens, *s.depths, 0) + s.decode_tokens + _SPARE
    return max(needed, 512) if s.sustained_s else needed


def most_context(path: Path) -> int | None:
    """The context of a bundle, file or checkpoint that we know."""
    with suppress(PhiError):
        return open_package(path).context
    with suppress(PhiError):
        return open_checkpoint(path).config.max_position_embeddings
    return None
