"""Let a model write the functions of a task, run them, and score: `phi-bench eval --task humaneval`."""

import hashlib
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import phi_runtime
from phi_bench.evaluate.code_problem import Post, Problem
from phi_bench.evaluate.code_tasks import Request, mean_and_error, pass_at_k, read_task
from phi_bench.measure.models import describe
from phi_runtime.contract import Contract, encode, read_record
from phi_runtime.errors import BenchmarkError, NotFoundError, OutputExistsError, UsageError
from phi_runtime.files import write_file
from phi_runtime.version import __version__
from phi_train.curate.report import Report
from phi_train.sandbox.run import Limits, Sandbox, run_all
from phi_train.teacher.cache import RequestCache

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
    kv: str | None
    prompt: str
    version: str


class Score(Contract, frozen=True):
    """pass@k: the mean over problems and its standard error."""

    k: int
    mean: float
    error: float


class Judged(Contract, frozen=True):
    """A problem's completions, what came of each, and in the program's words why."""

    task_id: str
    completions: tuple[str, ...]
    kinds: tuple[str, ...]
    messages: tuple[str, ...]


class Half(Contract, frozen=True):
    """The problems that a training corpus is similar to, or those that it is not, and the scores of these alone."""

    similar: bool
    problems: int
    scores: tuple[Score, ...]


class CodeResult(Contract, frozen=True):
    """A whole evaluation. kinds: how many completions passed, failed, raised, ran too long. halves: both, if asked."""

    settings: Settings
    scores: tuple[Score, ...]
    halves: tuple[Half, ...]
    kinds: dict[str, int]
    problems: tuple[Judged, ...]


def evaluate(asked: Request, out: Path, force: bool = False, progress: Progress = lambda *_: None) -> CodeResult:
    """Write OUT; what the model wrote so far is kept in OUT.completions, from where the same call goes on.

    Raises BenchmarkError for a task, UsageError for settings that do not go together, OutputExistsError for a result
    that is there or was begun otherwise, SandboxError where programs cannot be run safely, and what
    `phi_runtime.load` raises.
    """
    _check(asked)
    if out.exists() and not force:
        raise OutputExistsError(f"{out}: exists already; name another file, or replace it with --force")
    digest, problems = read_task(asked.task)
    problems = problems[: asked.limit]
    split = _split(asked.split, problems) if asked.split is not None else None
    with Sandbox():  # before hours of writing
        pass
    kept = out.with_name(out.name + ".completions")
    with phi_runtime.load(asked.model, threads=asked.threads, kv=asked.kv) as phi:
        prompts = [_prompt(phi, p, asked.chat) for p in problems]
        settings = _settings(asked, digest, len(problems), prompts[0])
        written: list[list[str]] = []
        with RequestCache(kept, encode(settings), force) as cache:
            for n, (problem, prompt) in enumerate(zip(problems, prompts, strict=True)):
                found = cache.get(problem.task_id)
                if found is None:
                    found = _completions(phi, problem, prompt, n, asked)
                    cache.put(found, problem.task_id)
                    progress(n + 1, len(problems), problem.task_id)
                elif not _are_texts(found, asked.samples):
                    raise BenchmarkError(f"{kept}: holds something else than completions; remove it")
                written.append(found)
    result = _judge(settings, problems, written, asked, split)
    write_file(out, encode(result) + "\n")
    kept.unlink()
    return result


def _are_texts(found: object, count: int) -> bool:
    return isinstance(found, list) and len(found) == count and all(isinstance(c, str) for c in found)


def _check(asked: Request) -> None:
    if asked.samples > 1 and asked.temperature == 0:
        raise UsageError("--samples above 1 needs --temperature: without it all samples are the same")
    if max(asked.k) > asked.samples:
        raise UsageError(f"pass@{max(asked.k)} needs --samples {max(asked.k)} or more")


def _prompt(phi: phi_runtime.Phi, problem: Problem, chat: bool) -> list[int]:
    # Models break off after a newline that they would rather write themselves (34 or 72 % by it alone,
    # bigcode-evaluation-harness#159).
    return phi.chat_prompt(problem.chat_message()) if chat else phi.tokenize(problem.prompt.rstrip())


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
        kv=asked.kv,
        prompt=hashlib.sha256(",".join(map(str, first)).encode()).hexdigest(),
        version=__version__,
    )


def _completions(phi: phi_runtime.Phi, problem: Problem, prompt: list[int], index: int, asked: Request) -> list[str]:
    stops = problem.stops if asked.post == "function" and not asked.chat else ()
    most = min(asked.max_tokens, phi.context - len(prompt))
    if most < 1:
        return [""] * asked.samples  # a model that cannot read the problem does not solve it
    return [
        phi.generate(
            prompt,
            max_tokens=most,
            temperature=asked.temperature,
            top_p=asked.top_p if asked.temperature else 1.0,
            seed=asked.seed + index * asked.samples + n,
            stop=stops,
        ).text
        for n in range(asked.samples)
    ]


def _judge(
    settings: Settings,
    problems: list[Problem],
    written: list[list[str]],
    asked: Request,
    split: dict[str, bool] | None = None,
) -> CodeResult:
    jobs = [
        p.job(c, settings.post, settings.chat)
        for p, completions in zip(problems, written, strict=True)
        for c in completions
    ]
    outcomes = run_all(jobs, Limits(seconds=asked.seconds))
    judged = []
    for problem, completions in zip(problems, written, strict=True):
        mine = list(islice(outcomes, len(completions)))
        kinds, messages = tuple(o.kind for o in mine), tuple(o.message for o in mine)
        judged.append(Judged(problem.task_id, tuple(completions), kinds, messages))
    halves = []
    for similar in (True, False) if split is not None else ():
        half = [j for j in judged if split is not None and split[j.task_id] == similar]
        halves.append(Half(similar, len(half), _scores(half, settings.samples, asked.k) if half else ()))
    scores = _scores(judged, settings.samples, asked.k)
    return CodeResult(
        settings, scores, tuple(halves), dict(Counter(kind for j in judged for kind in j.kinds)), tuple(judged)
    )


def _scores(judged: list[Judged], samples: int, ks: tuple[int, ...]) -> tuple[Score, ...]:
    return tuple(
        Score(k, *mean_and_error([pass_at_k(j.kinds.count("passed"), samples, k) for j in judged])) for k in ks
    )


def _split(report: Path, problems: list[Problem]) -> dict[str, bool]:
    """Whether a training corpus is similar to a problem, by its name."""
    if not report.is_file():
        raise NotFoundError(f"--split {report}: no such file; give report.json of `phi-train data decontaminate`")
    found = read_record(report, Report, BenchmarkError, "give report.json of `phi-train data decontaminate`")
    similar = {p.id: p.similar for p in found.problems}
    if missing := next((p.task_id for p in problems if p.task_id not in similar), None):
        raise BenchmarkError(f"--split {report}: is about {found.against}, which has no {missing}; give this task's")
    return similar
