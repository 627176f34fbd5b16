"""`load`, and the `Phi` that it returns: text in, text out."""

import asyncio
import threading
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Self, Unpack, cast
from weakref import WeakKeyDictionary

import numpy as np

from phi_runtime.architecture.decoder import F32
from phi_runtime.backends import open_backend, own_tokenizer
from phi_runtime.errors import ChatError, TokenError, UsageError
from phi_runtime.generation import prompt_cache
from phi_runtime.generation.batch import SupportsBatches, generate
from phi_runtime.generation.config import GenerationConfig, Options
from phi_runtime.generation.engine import Engine, FinishReason, Step
from phi_runtime.package.manifest import Manifest
from phi_runtime.package.open import Package, open_package
from phi_runtime.package.self_test import check_self_test
from phi_runtime.planning.available import group_limit
from phi_runtime.planning.memory import plan_package
from phi_runtime.text.chat_templates import ChatFormat, Messages, get_format
from phi_runtime.text.tokenizer import FILE as TOKENIZER
from phi_runtime.text.tokenizer import StreamDecoder, TextStop, Tokenizer, TokenizerLike

_POLL = 0.005  # seconds
_MOST_ROWS = 64


@dataclass(frozen=True)
class Chunk:
    """One step of a stream: the text that became certain with it, and the bytes that its token spells, which may be a
    part of a character; none for a special token.
    """

    text: str
    bytes: bytes
    step: Step


@dataclass(frozen=True)
class Completion:
    """A finished generation.

    ttft_s: seconds to the first token. decode_tps: tokens per second after it. reused: tokens of the prompt that were
    still in the cache. dropped: tokens that the context policy took out.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: FinishReason | None
    ttft_s: float
    decode_tps: float
    prompt_tokens: int
    reused: int
    dropped: int

    def __str__(self) -> str:
        return self.text


class _Run:
    """A stream that is advanced in one thread and left in another: it ends where nobody is inside any more."""

    def __init__(self, pieces: Generator[Chunk, None, None], ended: Callable[[], None]) -> None:
        self._pieces, self._ended = pieces, ended
        self._inside, self._left, self._lock = False, False, threading.Lock()

    def advance(self) -> Chunk | None:
        """The next piece, None at the end and after `leave`."""
        with self._lock:
            if self._left:
                return None
            self._inside = True
        try:
            return next(self._pieces, None)
        finally:
            with self._lock:
                self._inside = False
                if self._left:
                    self._end()

    def leave(self) -> None:
        """No further piece is wanted."""
        with self._lock:
            self._left = True
            if not self._inside:
                self._end()

    def _end(self) -> None:
        self._pieces.close()
        self._ended()


class Phi:
    """A loaded model.

    It answers one call at a time. Calls from other threads or tasks wait for their turn; a stream has the turn until it
    is exhausted or closed, and its own thread gets a UsageError for another call meanwhile.
    """

    def __init__(
        self,
        package: Package,
        engine: Engine,
        tokenizer: TokenizerLike,
        chat: ChatFormat | None,
        kv: str | None = None,
    ) -> None:
        self._kv = kv
        self.package = package
        self.tokenizer = tokenizer
        self.engine = engine
        self.chat_format = chat
        self._turn, self._owner, self._closed = threading.Lock(), 0, False
        self._worker = ThreadPoolExecutor(1)  # for asynchronous calls
        self._task_turns: WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = WeakKeyDictionary()

    @property
    def manifest(self) -> Manifest | None:
        """What the bundle says of itself; None for a model of another make."""
        return self.package.manifest

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

    def chat_prompt(self, messages: str | Messages) -> list[int]:
        """The tokens of a conversation up to the next reply; a plain text is one message of the user.

        Raises ChatError where the model has no chat format that we know, or cannot say a message in it.
        """
        if self.chat_format is None:
            raise ChatError(
                f"{self.package.path}: its chat template is none that we know; give load(…, chat=…) or --chat-format, "
                "see phi_runtime.text.chat_templates, or write the prompt yourself for generate()"
            )
        said: Messages = [{"role": "user", "content": messages}] if isinstance(messages, str) else messages
        return self.tokenize(self.chat_format.render(said, self.package.bos_token))

    def logits(self, tokens: list[int]) -> F32:
        """Logits [len(tokens), vocab_size] after each token, from an empty context."""
        with self._my_turn():
            return self.engine.logits(tokens)

    def score(self, tokens: list[int], start: int) -> tuple[list[float], bool]:
        """Natural-log probabilities of tokens[start:], each after all before it, and whether all are the likeliest.

        Quick for many endings of one beginning, which stays in the cache. Raises UsageError for a start that leaves
        nothing before it or behind it, TokenError, ContextError.
        """
        with self._my_turn():
            return self.engine.score(tokens, start)

    def self_test(self) -> float:
        """Compute the bundle's self-test on this engine and device; its KL divergence in nats, 0.0001 to 0.03 where all
        is well. Raises VerificationError where another model is computed, UsageError for what has no self-test.
        """
        test = self.manifest.self_test if self.manifest is not None else None
        if test is None:
            raise UsageError(f"{self.package.path}: has no self-test; export it again with this version")
        what = f"{self.package.path} on {self.backend}"
        return check_self_test(test, self.logits(list(test.tokens)), what, self._kv)

    def stream(self, prompt: str | list[int], **options: Unpack[Options]) -> Generator[Chunk, None, None]:
        """Generate step by step. Raises TokenError for an empty prompt, ContextError for a long one."""
        tokens = self._tokens(prompt)
        with self._my_turn():
            yield from self._stream(tokens, **options)

    def generate(self, prompt: str | list[int], **options: Unpack[Options]) -> Completion:
        """Generate to the end."""
        tokens = self._tokens(prompt)
        return _answer(len(tokens), list(self.stream(tokens, **options)))

    def generate_batch(
        self, prompts: Sequence[str | list[int]], rows: int = 8, **options: Unpack[Options]
    ) -> list[Completion]:
        """The answers to several prompts, `rows` at a time: quicker for evaluation than one after the other.

        They are those of `generate`, up to an engine's rounding, with neither prompt lookup nor prefix caching. Engines
        that have no batches, and models whose positions differ from row to row in an ONNX graph (LongRoPE, learnt
        positions, block-sparse attention), answer one after the other. Raises UsageError for a constraint or a sliding
        window.
        """
        if options.get("constraint") is not None or options.get("policy") == "sliding-window":
            raise UsageError("generate_batch takes no constraint and no sliding window; call generate for each prompt")
        if not 1 <= rows <= _MOST_ROWS:
            raise UsageError(f"rows {rows} is not between 1 and {_MOST_ROWS}")
        if isinstance(prompts, str):
            raise UsageError("generate_batch takes a list of prompts; for one, call generate")
        texts = [self._tokens(p) for p in prompts]
        backend = self.engine.backend
        if not isinstance(backend, SupportsBatches) or not self.package.shape.batches:
            return [self.generate(text, **options) for text in texts]
        with self._my_turn():
            return self._batch(backend, min(rows, len(texts)), texts, **options) if texts else []

    def chat(self, messages: str | Messages, **options: Unpack[Options]) -> Completion:
        """The reply to a conversation: [{"role": "user", "content": "…"}, …], or a text of the user."""
        return self.generate(self.chat_prompt(messages), **options)

    def chat_stream(self, messages: str | Messages, **options: Unpack[Options]) -> Generator[Chunk, None, None]:
        """As `chat`, step by step."""
        return self.stream(self.chat_prompt(messages), **options)

    async def astream(self, prompt: str | list[int], **options: Unpack[Options]) -> AsyncGenerator[Chunk, None]:
        """As `stream`, in worker threads; a task that is cancelled ends it within one token."""
        tokens = self._tokens(prompt)
        async with self._task_turns.setdefault(asyncio.get_running_loop(), asyncio.Lock()):
            while not self._turn.acquire(blocking=False):  # a thread has it
                await asyncio.sleep(_POLL)
            self._owner = threading.get_ident()
            run = _Run(self._stream(tokens, **options), self._give_turn)
            try:
                self._check_open()
                while True:
                    step = asyncio.wrap_future(self._worker.submit(run.advance))
                    piece = await asyncio.shield(step)
                    if piece is None:
                        return
                    yield piece
            finally:  # without another await: whoever cancels once may do so again
                self._owner = 0  # whoever calls now waits for the step that may still be under way
                self.engine.cancelled = True
                run.leave()

    async def agenerate(self, prompt: str | list[int], **options: Unpack[Options]) -> Completion:
        """As `generate`, in worker threads."""
        tokens = self._tokens(prompt)
        return _answer(len(tokens), [piece async for piece in self.astream(tokens, **options)])

    async def achat(self, messages: str | Messages, **options: Unpack[Options]) -> Completion:
        """As `chat`, in worker threads."""
        return await self.agenerate(self.chat_prompt(messages), **options)

    def save_session(self, path: str | Path) -> None:
        """Keep what the model has read in a file, so that a later process need not read it again.

        Raises UsageError for a backend that cannot, DiskFullError.
        """
        with self._my_turn():
            prompt_cache.save(Path(path), self.engine, self.package.digest)

    def load_session(self, path: str | Path) -> int:
        """Take up what `save_session` kept; how many tokens that are. Calls that begin with them read on from there.

        Load only files that you trust as you trust the model. Raises NotFoundError, BundleError for a file that is
        damaged or of another model, engine or version, ContextError for one that is too long for this context.
        """
        with self._my_turn():
            return prompt_cache.load(Path(path), self.engine, self.package.digest)

    def close(self) -> None:
        """Give back the memory. What is being generated ends within a token; any later call gets a UsageError."""
        if self._closed:
            return
        self._closed = self.engine.cancelled = True
        if self._owner != threading.get_ident():  # else the stream that is open in this very thread frees it at its end
            with self._turn:
                self._free()

    def _free(self) -> None:
        self._worker.shutdown(wait=False)
        for engine in (self.engine, self.engine.draft):
            if engine is not None:
                engine.backend.close()

    def _give_turn(self) -> None:
        self._owner = 0
        if self._closed:
            self._free()
        self._turn.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None) -> None:
        self.close()

    @contextmanager
    def _my_turn(self) -> Iterator[None]:
        me = threading.get_ident()
        if self._owner == me:
            raise UsageError("a stream of this model is open in this very thread; read it to its end, or close() it")
        self._turn.acquire()
        self._owner = me
        try:
            self._check_open()
            yield
        finally:
            self._give_turn()

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this model is closed; load it again")

    def _tokens(self, prompt: str | list[int]) -> list[int]:
        """The tokens of a prompt. Raises TokenError for what is neither a text nor a list of tokens."""
        if isinstance(prompt, str):
            return self.tokenize(prompt)
        if not isinstance(prompt, Sequence | np.ndarray) or isinstance(prompt, bytes):
            raise TokenError(f"a prompt is a text or a list of tokens, not {type(prompt).__name__}")
        try:
            return [index(cast(int, token)) for token in prompt]
        except TypeError:
            raise TokenError("a prompt is a text or a list of tokens, and this list holds other things") from None

    def _stream(self, tokens: list[int], **options: Unpack[Options]) -> Generator[Chunk, None, None]:
        self._check_open()
        o = GenerationConfig(**options)
        text = _Text(self.tokenizer, tokens, o.stop)
        speculates = self.engine.draft is not None if o.speculate is None else o.speculate
        with closing(
            self.engine.stream(tokens, o.max_tokens, o, o.policy, speculates, o.constraint, o.top_logprobs)
        ) as steps:
            for step in steps:
                piece = text.push(step)
                yield piece
                if piece.step.finish_reason or self._closed:
                    return

    def _batch(
        self, backend: SupportsBatches, rows: int, prompts: list[list[int]], **options: Unpack[Options]
    ) -> list[Completion]:
        o = GenerationConfig(**options)
        fitted = [self.engine.fit(tokens, o.max_tokens, o.policy) for tokens in prompts]
        texts = [_Text(self.tokenizer, tokens, o.stop) for tokens, _ in fitted]
        pieces: list[list[Chunk]] = [[] for _ in fitted]
        longest = max(len(tokens) for tokens, _ in fitted)
        slots = min(longest + o.max_tokens, self.context)

        def heard(n: int, step: Step) -> bool:
            tokens, dropped = fitted[n]
            if step.finish_reason is None and len(tokens) + len(pieces[n]) >= slots:
                step = replace(step, finish_reason="context")
            pieces[n].append(texts[n].push(replace(step, dropped=0 if pieces[n] else dropped)))
            return pieces[n][-1].step.finish_reason is None and not self._closed

        batch = backend.batch(rows, slots)
        try:
            given = [tokens for tokens, _ in fitted]
            stops = self.engine.stop_tokens
            generate(batch, rows, given, o.max_tokens, o, stops, o.top_logprobs, heard)
        finally:
            batch.close()
        return [_answer(len(tokens), said) for tokens, said in zip(prompts, pieces, strict=True)]


class _Text:
    """The text of an answer, step by step."""

    def __init__(self, tokenizer: TokenizerLike, prompt: list[int], stop: str | Sequence[str]) -> None:
        self._tokenizer, self._decoder = tokenizer, StreamDecoder(tokenizer, prompt)
        self._ends = TextStop([stop] if isinstance(stop, str) else stop)

    def push(self, step: Step) -> Chunk:
        """The piece of a step; its stop is this text's."""
        spelt = self._tokenizer.token_bytes(step.token)
        text = "" if step.finish_reason == "stop_token" else self._decoder.push(step.token)
        text = self._ends.push(text + (self._decoder.flush() if step.finish_reason else ""))
        if self._ends.found:
            return Chunk(text, spelt, replace(step, finish_reason="stop_text"))
        return Chunk(text + (self._ends.flush() if step.finish_reason else ""), spelt, step)


def _answer(prompt_tokens: int, pieces: list[Chunk]) -> Completion:
    steps = [p.step for p in pieces]
    after_first = sum(s.seconds for s in steps[1:])
    return Completion(
        text="".join(p.text for p in pieces),
        tokens=tuple(s.token for s in steps),
        logprobs=tuple(s.logprob for s in steps),
        finish_reason=steps[-1].finish_reason if steps else None,
        ttft_s=steps[0].seconds if steps else 0.0,
        decode_tps=(len(steps) - 1) / after_first if after_first else 0.0,
        prompt_tokens=prompt_tokens,
        reused=steps[0].reused if steps else 0,
        dropped=sum(s.dropped for s in steps),
    )


def load(
    path: str | Path,
    backend: str | None = None,
    context: int | None = None,
    memory: int | str | None = None,
    threads: int | None = None,
    kv: str | None = None,
    chat: str | None = None,
    draft: str | Path | None = None,
    device: str = "auto",
) -> Phi:
    """Open a bundle that phi-export wrote, a Phi in a GGUF file, or an onnxruntime-genai folder.

    backend: see `phi_runtime.backends`, by default the first of the format. context: tokens to reserve, by default
    what the model has, up to 4,096. memory: bytes, or a size such as "2.5GB", that context and cache are chosen within
    (see `plan`). threads: by default one per core. kv: the type of the cache, such as q8_0 (llama.cpp) or int8
    (onnxruntime, calibrated bundles). chat: a format of `phi_runtime.text.chat_templates`, for a model whose template
    is not known. draft: a small model of the same tokenizer, which proposes tokens for this one to check. device:
    "cpu", "gpu", or "auto" for the one that the installed engine prefers.

    Raises NotFoundError, BundleError, UnsupportedError, MissingExtraError, UsageError for a backend that does not run
    the format or a device that it cannot use, ContextError for a context beyond the model's, MemoryPlanError where
    `memory` is too little. Where a cgroup (a container) limits this process, that is the default of `memory`.
    """
    package = open_package(path)
    said = package.chat if chat is None else get_format(chat)
    allowed = memory if memory is not None else group_limit()  # beyond which the kernel ends the process
    if allowed is not None:
        found = plan_package(package, context=context, memory=allowed, kv=kv, backend=backend)
        context, kv = found.context, found.kv
    tokenizer: TokenizerLike | None = None if package.folder is None else Tokenizer(package.folder)
    opened = open_backend(package, backend, context, threads, kv, device)
    tokenizer = tokenizer or own_tokenizer(package, opened)
    assert tokenizer is not None, "every package has a tokenizer.json or a GGUF file"
    engine = Engine(opened, package.stop_tokens, package.shape.crossover)
    if draft is not None:
        engine.draft = _open_draft(draft, package, threads)
    return Phi(package, engine, tokenizer, said, kv)


def _open_draft(path: str | Path, package: Package, threads: int | None) -> Engine:
    other = open_package(path)
    folders = other.folder, package.folder
    if None in folders or len({(f / TOKENIZER).read_bytes() for f in folders if f is not None}) != 1:
        raise UsageError(f"{path}: is no draft for {package.path}: both need the same tokenizer.json")
    if other.shape.vocab_size != package.shape.vocab_size:
        raise UsageError(f"{path}: is no draft for {package.path}: its vocabulary has another size")
    return Engine(open_backend(other, None, None, 1), ())
