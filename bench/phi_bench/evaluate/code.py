"""Let a model write the functions of a task, run them, and score: `phi-bench eval --task humaneval`."""

import hashlib
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import msgspec

import phi_runtime
from phi_bench.evaluate.code_tasks import (
    STOPS,
    Post,
    Problem,
    chat_message,
    mean_and_error,
    pass_at_k,
    read_task,
)
from phi_bench.measure.models import describe
from phi_runtime.contract import Contract, encode
from phi_runtime.errors import BenchmarkError, OutputExistsError, UsageError
from phi_runtime.files import write_file
from phi_runtime.version import __version__
from phi_train.sandbox.run import Limits, Sandbox, run_all

Progress = Callable[[int, int, str], None]  # problems done, of all, the last one's name


class Settings(Contract, frozen=True):
    """What the completions depend on.

    chat: asked in the model's chat format, or the bare prompt. prompt: sha256 of the first prompt as the model reads
    it, so that two results can be seen to have asked the same.
    """

    model: str
    model_sha256: str
    task: str
    task_sha256: str
    problems: int
    chat: bool
    post: Post
    samples: int
    temperature: float
    top_p: float
    max_tokens: int
    seed: int
    prompt: str
    version: str


class Score(Contract, frozen=True):
    """pass@k: the mean over problems and its standard error."""

    k: int
    mean: float
    error: float


class Written(Contract, frozen=True):
    """What a model wrote for a problem."""

    task_id: str
    completions: tuple[str, ...]


class Judged(Contract, frozen=True):
    """A problem's completions, what came of each, and in the program's words why."""

    task_id: str
    completions: tuple[str, ...]
    kinds: tuple[str, ...]
    messages: tuple[str, ...]


class CodeResult(Contract, frozen=True):
    """A whole evaluation. kinds: how many completions passed, failed, raised, ran too long."""

    settings: Settings
    scores: tuple[Score, ...]
    kinds: dict[str, int]
    problems: tuple[Judged, ...]


@dataclass(frozen=True)
class Request:
    """What is asked for. limit: the first so many problems. k: of pass@k. seconds: of each program."""

    model: Path
    task: str
    chat: bool = False
    post: Post = "function"
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 0.95
    max_tokens: int = 512
    seed: int = 0
    limit: int | None = None
    k: tuple[int, ...] = (1,)
    threads: int | None = None
    seconds: float = 10.0


def evaluate(asked: Request, out: Path, force: bool = False, progress: Progress = lambda *_: None) -> CodeResult:
    """Write OUT; what the model wrote so far is kept in OUT.completions, from where the same call goes on.

    Raises BenchmarkError, UsageError for settings that do not go together, OutputExistsError for a result that is there
    or was begun otherwise, SandboxError where programs cannot be run safely, and what `phi_runtime.load` raises.
    """
    _check(asked)
    if out.exists() and not force:
        raise OutputExistsError(f"{out}: exists already; name another file, or replace it with --force")
    digest, problems = read_task(asked.task)
    problems = problems[: asked.limit]
    with Sandbox():  # before hours of writing
        pass
    kept = out.with_name(out.name + ".completions")
    with phi_runtime.load(asked.model, threads=asked.threads) as phi:
        prompts = [_prompt(phi, p, asked.chat) for p in problems]
        settings = _settings(asked, digest, len(problems), prompts[0])
        done = _begun(kept, settings, force)
        with open(kept, "ab") as f:
            for n, (problem, prompt) in enumerate(zip(problems, prompts, strict=True)):
                if n < len(done):
                    continue
                done.append(Written(problem.task_id, _completions(phi, prompt, n, asked)))
                f.write(encode_line(done[-1]))
                f.flush()
                os.fsync(f.fileno())
                progress(n + 1, len(problems), problem.task_id)
    result = _judge(settings, problems, done, asked)
    write_file(out, encode(result) + "\n")
    kept.unlink()
    return result


def _check(asked: Request) -> None:
    if asked.samples > 1 and asked.temperature == 0:
        raise UsageError("--samples above 1 needs --temperature: without it all samples are the same")
    if max(asked.k) > asked.samples:
        raise UsageError(f"pass@{max(asked.k)} needs --samples {max(asked.k)} or more")


def _prompt(phi: phi_runtime.Phi, problem: Problem, chat: bool) -> list[int]:
    # Models break off after a newline that they would rather write themselves (34 or 72 % by it alone,
    # bigcode-evaluation-harness#159).
    return phi.chat_prompt(chat_message(problem)) if chat else phi.tokenize(problem.prompt.rstrip())


def _settings(asked: Request, digest: str, problems: int, first: list[int]) -> Settings:
    return Settings(
        model=asked.model.name,
        model_sha256=describe(asked.model, asked.model.name).sha256,
        task=asked.task.partition("=")[0],
        task_sha256=digest,
        problems=problems,
        chat=asked.chat,
        post=asked.post,
        samples=asked.samples,
        temperature=asked.temperature,
        top_p=asked.top_p if asked.temperature else 1.0,
        max_tokens=asked.max_tokens,
        seed=asked.seed,
        prompt=hashlib.sha256(",".join(map(str, first)).encode()).hexdigest(),
        version=__version__,
    )


def _completions(phi: phi_runtime.Phi, prompt: list[int], index: int, asked: Request) -> tuple[str, ...]:
    stops = STOPS if asked.post == "function" and not asked.chat else ()
    most = min(asked.max_tokens, phi.context - len(prompt))
    if most < 1:
        return ("",) * asked.samples  # a model that cannot read the problem does not solve it
    return tuple(
        phi.generate(
            prompt,
            max_tokens=most,
            temperature=asked.temperature,
            top_p=asked.top_p if asked.temperature else 1.0,
            seed=asked.seed + index * asked.samples + n,
            stop=stops,
        ).text
        for n in range(asked.samples)
    )


def encode_line(record: msgspec.Struct) -> bytes:
    """One line of JSON."""
    return msgspec.json.encode(record) + b"\n"


def _begun(kept: Path, settings: Settings, force: bool) -> list[Written]:
    """What the same call has written; a line that a kill cut is dropped."""
    if kept.exists() and not force:
        lines = kept.read_bytes().splitlines(keepends=True)
        if lines and lines[0] != encode_line(settings):
            raise OutputExistsError(f"{kept}: was begun with other settings; name another file, or use --force")
        whole = [line for line in lines[1:] if line.endswith(b"\n")]
        if lines:
            write_file(kept, b"".join([lines[0], *whole]))
            try:
                return [msgspec.json.decode(line, type=Written) for line in whole]
            except msgspec.MsgspecError as e:
                raise BenchmarkError(f"{kept}: is damaged ({e}); delete it") from None
    write_file(kept, encode_line(settings))
    return []


def _judge(settings: Settings, problems: list[Problem], done: list[Written], asked: Request) -> CodeResult:
    pairs = [(p, c) for p, w in zip(problems, done, strict=True) for c in w.completions]
    jobs = [p.job(c, settings.post, settings.chat) for p, c in pairs]
    outcomes = list(run_all(jobs, Limits(seconds=asked.seconds)))
    judged = []
    for n, w in enumerate(done):
        mine = outcomes[n * settings.samples : (n + 1) * settings.samples]
        judged.append(Judged(w.task_id, w.completions, tuple(o.kind for o in mine), tuple(o.message for o in mine)))
    scores = []
    for k in asked.k:
        values = [pass_at_k(j.kinds.count("passed"), settings.samples, k) for j in judged]
        scores.append(Score(k, *mean_and_error(values)))
    return CodeResult(settings, tuple(scores), dict(Counter(o.kind for o in outcomes)), tuple(judged))
