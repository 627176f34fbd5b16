"""The verification text, and the check that every client tokenises it alike."""

import random
from collections.abc import Iterator
from pathlib import Path

from phi_export.defaults import LARGE
from phi_export.verify.subprocess_run import Artifact
from phi_runtime.architecture.checkpoint import Checkpoint
from phi_runtime.architecture.config import num_parameters
from phi_runtime.errors import BundleError, CheckpointError, UsageError
from phi_runtime.files import read_text
from phi_runtime.text.tokenizer import Tokenizer

DEFAULT_TOKENS = 256  # or as many as reach beyond the model's window, unless the model is large
BEYOND = 64  # tokens read beyond a window

_SAMPLE = Path(__file__).with_name("sample.txt")
_UNUSUAL = "\n\t  a   b\u00e9\u65e5\U0001f600 x I'LL we've 1234567 \r\n\r\n e\u0301 \u00a0nbsp x=3.14;"
_AROUND = (" ", "  ", "\n", "\n\n ", "a", " b", "word ", " 42", "\u00e9\u65e5", "\t", "'s")
_PROBED = 200  # added tokens looked at, and random strings of them


def sample_tokens(checkpoint: Checkpoint, text: Path | None = None, count: int | None = None) -> list[int]:
    """The first `count` tokens of a text; by default, of the built-in sample, enough to see all there is.

    Raises NotFoundError, UsageError for a text that cannot be read or is too short.
    """
    content = read_text(text or _SAMPLE, "--text")
    tokens = Tokenizer(checkpoint.folder).encode(content)
    if text is None:  # the sample is short: read it again and again
        window = checkpoint.config.decoder().window() or 0
        beyond = window + BEYOND if num_parameters(checkpoint.config) < LARGE else 0
        wanted = count or max(DEFAULT_TOKENS, beyond)
        tokens *= -(-wanted // max(1, len(tokens)))
        count = wanted
    tokens = tokens[:count]
    if tokens and max(tokens) >= checkpoint.config.vocab_size:
        raise CheckpointError(f"{checkpoint.folder}: its tokenizer gives tokens beyond the embedding")
    if len(tokens) < 2:
        raise UsageError(f"{text or _SAMPLE}: gives {len(tokens)} tokens; at least two are needed")
    return tokens


def check_tokenizer(artifact: Artifact, checkpoint: Checkpoint) -> None:
    """Raises BundleError where an artifact has a tokenizer of its own that splits otherwise than tokenizer.json."""
    ours = Tokenizer(checkpoint.folder)
    for text in (_SAMPLE.read_text(encoding="utf-8") + _UNUSUAL, *_probes(ours.added_tokens)):
        theirs = artifact.tokenize(text)
        if theirs is None:
            return
        if theirs != (expected := ours.encode(text)):
            at = next((i for i, (a, b) in enumerate(zip(theirs, expected, strict=False)) if a != b), len(expected))
            raise BundleError(
                f"the artifact's own tokenizer splits {text[:60]!r} otherwise than tokenizer.json: "
                f"{theirs[at : at + 4]} for {expected[at : at + 4]} from token {at} on; "
                "llama.cpp may not have its kind: use --format onnx,coreml"
            )


def _probes(added: list[str]) -> Iterator[str]:
    """Added tokens with and without spaces, line breaks and letters around them, and random strings of them."""
    draw = random.Random(0)  # noqa: S311
    for token in added if len(added) <= _PROBED else draw.sample(added, _PROBED):
        yield from (f"{before}{token}{after}" for before in ("", "a", "b ", "c\n") for after in ("", "d", " e", "\n f"))
    pieces = [*added, *(_AROUND * max(1, len(added) // 4))]
    for _ in range(_PROBED):
        yield "".join(draw.choices(pieces, k=6))
