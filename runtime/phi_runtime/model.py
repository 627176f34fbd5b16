"""`load` and what it gives: a model that takes text and gives text."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from phi_runtime.backends import open_backend
from phi_runtime.bundle import Manifest, find_bundle, read_manifest
from phi_runtime.decoder import F32
from phi_runtime.engine import Engine, Step, StopReason
from phi_runtime.sampler import Sampling
from phi_runtime.tokenizer import StreamDecoder, Tokenizer


@dataclass(frozen=True)
class Piece:
    """One step of a stream: its token and the text that became certain with it."""

    text: str
    step: Step


@dataclass(frozen=True)
class Answer:
    """A finished generation."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    stop: StopReason | None
    ttft_s: float
    decode_tps: float

    def __str__(self) -> str:
        return self.text


class Phi:
    """A loaded model. One call at a time: share it between threads only behind a lock."""

    def __init__(self, manifest: Manifest, engine: Engine, tokenizer: Tokenizer) -> None:
        self.manifest = manifest
        self.tokenizer = tokenizer
        self.engine = engine

    @property
    def backend(self) -> str:
        """Name of the engine underneath."""
        return self.engine.backend.name

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.engine.backend.context

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written in it are recognised, none are added."""
        return self.tokenizer.encode(text)

    def detokenize(self, tokens: list[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self.tokenizer.decode(tokens)

    def logits(self, tokens: list[int]) -> F32:
        """Logits [len(tokens), vocab_size] after each token, from an empty context."""
        return self.engine.logits(tokens)

    def stream(
        self,
        prompt: str | list[int],
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Iterator[Piece]:
        """Generate step by step. Raises TokenError for an empty prompt, ContextError for a long one."""
        tokens = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        decoder = StreamDecoder(self.tokenizer, tokens)
        for step in self.engine.stream(tokens, max_tokens, Sampling(temperature, top_k, top_p, seed)):
            text = "" if step.stop == "stop_token" else decoder.push(step.token)
            yield Piece(text + (decoder.flush() if step.stop else ""), step)

    def generate(
        self,
        prompt: str | list[int],
        max_tokens: int = 256,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
        seed: int = 0,
    ) -> Answer:
        """Generate to the end; the arguments are those of `stream`."""
        pieces = list(self.stream(prompt, max_tokens, temperature, top_k, top_p, seed))
        steps = [p.step for p in pieces]
        after_first = sum(s.seconds for s in steps[1:])
        return Answer(
            text="".join(p.text for p in pieces),
            tokens=tuple(s.token for s in steps),
            logprobs=tuple(s.logprob for s in steps),
            stop=steps[-1].stop if steps else None,
            ttft_s=steps[0].seconds if steps else 0.0,
            decode_tps=(len(steps) - 1) / after_first if after_first else 0.0,
        )

    def close(self) -> None:
        """Give back the memory."""
        self.engine.backend.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None) -> None:
        self.close()


def load(path: str | Path, backend: str | None = None, context: int | None = None, threads: int | None = None) -> Phi:
    """Open a bundle that phi-export wrote, on the backend of its format.

    path: the bundle's folder, or a file in it. backend: see `phi_runtime.backends`, by default
    the first of its format. context: tokens to reserve, by default all the bundle has up to 4,096.
    threads: by default one per core. Raises NotFoundError, BundleError, UnsupportedError, MissingExtraError,
    UsageError for a backend that does not run the format, ContextError for a context beyond the bundle's.
    """
    folder = find_bundle(path)
    manifest = read_manifest(folder)
    tokenizer = Tokenizer(folder)
    engine = Engine(open_backend(folder, manifest, backend, context, threads), manifest.stop_tokens)
    return Phi(manifest, engine, tokenizer)
