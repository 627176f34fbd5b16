"""`phi-bench run`: every row in turn, round after round, each in a process of its own.

The result file is written after each process. One that a kill left incomplete is taken up by the same command.
"""

import datetime
import hashlib
import os
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec

from phi_bench import figures
from phi_bench.adapters import Adapter, adapter, choose
from phi_bench.environments import versions_in
from phi_bench.measure import host
from phi_bench.measure.checkpoint import describe_checkpoint, reference_logits
from phi_bench.measure.job import Job
from phi_bench.measure.models import describe, files
from phi_bench.measure.process import Outcome, measure
from phi_bench.records import (
    Benchmark,
    Conditions,
    Configuration,
    Failure,
    Model,
    Prediction,
    Row,
    Run,
    Settings,
    read_benchmark,
)
from phi_bench.results.write import write_benchmark
from phi_export.verify.logits import WINDOW
from phi_export.verify.text import sample_tokens
from phi_runtime.architecture.checkpoint import Checkpoint, open_checkpoint
from phi_runtime.backends import cores
from phi_runtime.errors import BenchmarkError, NotFoundError, OutputExistsError, PhiError, UsageError
from phi_runtime.package.open import open_package
from phi_runtime.planning.memory import plan

PROMPTS = (
    'def read_lines(path):\n    """Return the lines of',
    "class Queue:\n    def __init__(self",
    "import os\nimport sys\n\n\ndef main(",
)
SAMPLE_TOKENS = 72
_PROMPT, _DECODE, _SPARE = 256, 64, 8  # tokens
_MOST_DEPTH = 1 << 20
_MOST_SWAPPED = 64 << 20  # bytes in one run; a machine that swaps measures its disk
_GUESS = {"start": 4.0, "read": 5e8, "prefill": 8.0}  # seconds, bytes per second, times decoding's speed


@dataclass(frozen=True)
class Subject:
    """A row to be."""

    path: Path
    model: str
    configuration: Configuration

    @property
    def name(self) -> str:
        """Of the row."""
        c = self.configuration
        engine = f" ({c.engine})" if c.adapter == "phi-run" else ""
        return f"{self.model} on {c.adapter}{engine}"


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
    """What is to be measured. models: paths, each with `@adapter` or `@adapter:engine` where one is wanted.

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


def run(request: Request, out: Path, progress: Progress | None = None) -> Benchmark:
    """Measure, and keep the result in `out`.

    Raises UsageError, NotFoundError and CheckpointError before anything is measured, OutputExistsError where `out`
    holds something else, BenchmarkError for a machine that swaps: what was measured until then is kept.
    """
    progress = progress or Progress()
    if (request.against is None) != (request.text is None):
        raise UsageError("quality needs both --against CKPT and --text FILE")
    if request.text is not None and request.text.is_file() and not request.text.stat().st_size:
        raise UsageError(f"--text {request.text}: is empty; give a text")
    request, prompt_tokens, decode_tokens = _sized(request, progress)
    if min(request.rounds, prompt_tokens - 1, decode_tokens) < 1:
        raise UsageError("a run needs a round, a prompt of two tokens and a token to generate at least")
    _check_depths(request, prompt_tokens, decode_tokens)
    subjects, models = _subjects(request, progress)
    b = _begin(request, subjects, models, out, progress)
    write_benchmark(out, b)
    return _measure_all(request, subjects, b, out, progress)


def _sized(request: Request, progress: Progress) -> tuple[Request, int, int]:
    """With the numbers of tokens that were left to us."""
    held = min((c for said in request.models if (c := _most(_split(said)[0]))), default=1 << 20)
    prompt_tokens = request.prompt_tokens or min(_PROMPT, held // 2)
    decode_tokens = request.decode_tokens or min(_DECODE, max(1, held - prompt_tokens - _SPARE))
    if None in (request.prompt_tokens, request.decode_tokens) and held < _PROMPT + _DECODE + _SPARE:
        progress.note(f"a context holds {held} tokens only: prompts of {prompt_tokens}, {decode_tokens} generated")
    sized = replace(request, prompt_tokens=prompt_tokens, decode_tokens=decode_tokens)
    return sized, prompt_tokens, decode_tokens


def _split(said: str) -> tuple[Path, str | None]:
    """A path, and the adapter that is wanted for it."""
    path, _, wanted = said.rpartition("@") if "@" in said and not Path(said).exists() else (said, "", "")
    return Path(path), wanted or None


def _check_depths(request: Request, prompt_tokens: int, decode_tokens: int) -> None:
    at = prompt_tokens
    for depth in request.depths:
        if not at + decode_tokens < depth < _MOST_DEPTH:
            raise UsageError(
                f"--depths {depth}: each has to be more than {decode_tokens} tokens beyond the one before it, "
                f"the first beyond the prompt of {prompt_tokens}, after which tokens are measured in any case"
            )
        at = depth


def _subjects(request: Request, progress: Progress) -> tuple[list[Subject], list[Model]]:
    paths: dict[str, str] = {}  # name -> path
    subjects: list[Subject] = []
    models: list[Model] = []
    threads = request.threads or cores()
    for said in request.models:
        where, wanted = _split(said)
        if str(where) not in paths.values():
            name = _unused_name(where, set(paths))
            paths[name] = str(where)
            progress.note(f"digesting {name}")
            models.append(describe(where, name))
        name = next(n for n, p in paths.items() if p == str(where))
        for adapter_name, engine in choose(where, wanted):
            known = adapter(adapter_name)
            configuration = Configuration(
                adapter=adapter_name,
                engine=engine,
                device=known.device,
                threads=threads,
                context=_context(request),
                kv=known.kv(where, engine, request.kv),
                command=known.says,
                versions=_versions(known),
            )
            subjects.append(Subject(where, name, configuration))
    if len({s.name for s in subjects}) < len(subjects):
        raise UsageError("a model is given twice for the same engine; give each once")
    return subjects, models


def _versions(known: Adapter) -> dict[str, str]:
    if known.environment is None:
        return host.versions(known.packages)
    return versions_in(known.environment, known.packages)


def _context(request: Request) -> int:
    needed = max(request.prompt_tokens or 0, *request.depths, 0) + (request.decode_tokens or 0) + _SPARE
    return max(needed, 512) if request.sustained_s else needed


def _unused_name(path: Path, taken: set[str]) -> str:
    """The last parts of a path, as many as tell it from the others."""
    whole = Path(os.path.realpath(path))
    parts = (*whole.parts[1:-1], whole.stem if whole.suffix == ".gguf" else whole.name)
    first = 2 if parts[-1] in ("gguf", "onnx", "coreml", "mlx", "model", "checkpoint") else 1
    for count in range(first, len(parts) + 1):
        if (name := "/".join(parts[-count:])) not in taken:
            return name
    raise UsageError(f"{path}: is given twice")


def _begin(request: Request, subjects: list[Subject], models: list[Model], out: Path, progress: Progress) -> Benchmark:
    """A fresh benchmark, or the incomplete one that is to go on."""
    checkpoint = None
    if request.against is not None:
        opened = open_checkpoint(request.against)
        progress.note("digesting the checkpoint")
        _check_architecture(opened, subjects)
        sample_tokens(opened, request.text, request.tokens)  # raises for a text that gives none
        checkpoint = describe_checkpoint(opened)
    settings = Settings(
        rounds=request.rounds,
        prompt_tokens=request.prompt_tokens or 1,
        decode_tokens=request.decode_tokens or 1,
        depths=request.depths,
        timeout_s=request.timeout_s,
        sustained_s=request.sustained_s,
        quality_tokens=request.tokens if request.against is not None else None,
        text_sha256=None if request.text is None else hashlib.sha256(request.text.read_bytes()).hexdigest(),
        memory_limit=request.memory_limit,
        prompts=PROMPTS,
    )
    rows = tuple(Row(s.name, s.model, s.configuration, predicted=_predict(s)) for s in subjects)
    packages = {name for s in subjects for name in adapter(s.configuration.adapter).packages}
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    fresh = Benchmark(
        began, False, host.host(), host.software(sorted(packages)), settings, tuple(models), rows, checkpoint
    )
    if not out.exists():
        return fresh
    try:
        old = read_benchmark(out)
    except PhiError as e:
        if request.force:
            return fresh
        raise OutputExistsError(f"{e}; --force replaces it") from None
    same = (old.settings, old.models, old.host.cpu) == (fresh.settings, fresh.models, fresh.host.cpu)
    same = same and [(r.name, r.configuration) for r in old.rows] == [(r.name, r.configuration) for r in fresh.rows]
    same = same and old.checkpoint_sha256 == fresh.checkpoint_sha256
    if request.force and (old.complete or not same):
        return fresh
    if old.complete or not same:
        what = "is a complete result" if old.complete else "was begun with other models, settings or versions"
        raise OutputExistsError(f"{out}: {what}; name another file, or replace it with --force")
    progress.note(f"going on with {out}: {sum(len(r.runs) for r in old.rows)} runs are there")
    return old


def _check_architecture(checkpoint: Checkpoint, subjects: list[Subject]) -> None:
    for s in subjects:
        with suppress(NotFoundError):
            manifest = open_package(s.path).manifest
            if manifest is not None and manifest.config() != checkpoint.config:
                raise UsageError(
                    f"{s.path}: is not of the architecture of {checkpoint.folder}; give its own checkpoint"
                )


def _predict(s: Subject) -> Prediction | None:
    if s.configuration.adapter != "phi-run":
        return None
    with suppress(PhiError):
        c = s.configuration
        found = plan(s.path, context=c.context, kv=c.kv, memory=1 << 50, backend=c.engine)
        return Prediction(found.peak, found.tokens_per_second)
    return None


def estimate(b: Benchmark) -> float:
    """Seconds that the speed of all rows will take, from bytes and bandwidth alone."""
    bandwidth = 0.4 * (b.host.read_bandwidth or 1e10)
    s, total = b.settings, 0.0
    for row in b.rows:
        m = figures.model_of(row, b)
        one = (m.read_bytes or m.file_bytes or 0) / bandwidth
        stops = len({1, s.prompt_tokens, *s.depths})
        read = max(s.prompt_tokens, *s.depths, 0)
        once = _GUESS["start"] + (m.file_bytes or 0) / _GUESS["read"] + one * s.decode_tokens * stops
        total += s.rounds * (once + one * read / _GUESS["prefill"] + s.sustained_s)
    return total


class _Bench:
    """The benchmark as it grows; each change is written."""

    def __init__(self, b: Benchmark, out: Path) -> None:
        self.b, self.out = b, out

    def row(self, name: str) -> Row:
        return next(r for r in self.b.rows if r.name == name)

    def change(self, name: str, **fields: object) -> None:
        rows = tuple(msgspec.structs.replace(r, **fields) if r.name == name else r for r in self.b.rows)
        self.b = msgspec.structs.replace(self.b, rows=rows)
        write_benchmark(self.out, self.b)

    def finish(self, **fields: object) -> Benchmark:
        depths = self.b.settings.depths
        rows = tuple(msgspec.structs.replace(r, doubts=figures.doubts(r, depths)) for r in self.b.rows)
        self.b = msgspec.structs.replace(self.b, rows=rows, **fields)
        write_benchmark(self.out, self.b)
        return self.b


def _measure_all(request: Request, subjects: list[Subject], b: Benchmark, out: Path, progress: Progress) -> Benchmark:
    growing = _Bench(b, out)
    judged = sum(_judge(s) is not None for s in subjects) if request.against else 0
    spoken = sum(_speaks(s, b) for s in subjects)
    steps = len(subjects) * request.rounds + judged + spoken
    progress.estimated(estimate(b), steps)
    done = 0
    for number in range(1, request.rounds + 1):
        for s in subjects:
            row = growing.row(s.name)
            if not any(r.failure is not None or r.round == number for r in row.runs):
                progress.step(done, steps, f"round {number} of {request.rounds}: {s.name}")
                found, build = _run_once(s, request, number)
                growing.change(s.name, runs=(*row.runs, found), build=build or row.build)
                _check_swap(found.conditions, out, growing)
            done += 1
    if request.against is not None:
        _judge_all(request, subjects, growing, progress, done, steps)
    done += judged
    for s in subjects:
        row = growing.row(s.name)
        if not _speaks(s, b):
            continue
        if not row.samples and figures.good_runs(row):
            progress.step(done, steps, f"samples: {s.name}")
            outcome = measure(_job(s, request, "samples"), request.timeout_s, request.memory_limit)
            if outcome.result is not None:
                growing.change(s.name, samples=outcome.result.samples)
        done += 1
    return growing.finish(complete=True)


def _speaks(s: Subject, b: Benchmark) -> bool:
    """Whether what a row's model writes is of interest: random weights write nothing."""
    random = next(m.random_weights for m in b.models if m.name == s.model)
    return s.configuration.adapter == "phi-run" and not random


def _check_swap(conditions: Conditions | None, out: Path, growing: _Bench) -> None:
    if conditions is not None and conditions.swapped > _MOST_SWAPPED:
        growing.finish()
        raise BenchmarkError(
            f"the machine swaps ({conditions.swapped / 1e6:.0f} MB in one run): what it measures is its disk; "
            f"free memory or leave out the largest model; the rows so far are in {out}"
        )


def _judge(s: Subject) -> tuple[str, str] | None:
    """The adapter and engine that give the logits of a row's file."""
    return adapter(s.configuration.adapter).judge(s.configuration.engine)


def _job(s: Subject, request: Request, mode: str, logits: str = "") -> Job:
    c = s.configuration
    name, engine = c.adapter, c.engine
    context = c.context or _context(request)
    if mode == "quality" and (judge := _judge(s)):
        name, engine = judge
    if mode == "samples":
        context = max(context, 256)
    return Job(
        mode=mode,  # type: ignore[arg-type]
        path=str(s.path),
        adapter=name,
        engine=engine,
        threads=c.threads,
        context=context,
        kv=c.kv if mode == "speed" or name == c.adapter else None,
        prompt_tokens=request.prompt_tokens or 0,
        decode_tokens=request.decode_tokens or 0,
        depths=request.depths,
        sustained_s=request.sustained_s,
        logits=logits,
        prompts=PROMPTS,
        sample_tokens=SAMPLE_TOKENS,
    )


def _run_once(s: Subject, request: Request, number: int) -> tuple[Run, str]:
    """One process, and how its engine was built. In the first round the model's files are out of the page cache, where
    the system allows that.
    """
    cold = number == 1 and host.drop_cached(files(s.path))
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    watch = host.Watch(s.configuration.threads)
    outcome: Outcome = measure(_job(s, request, "speed"), request.timeout_s + request.sustained_s, request.memory_limit)
    conditions = watch.conditions(outcome.cpu_s)
    r = outcome.result
    found = Run(
        round=number,
        began=began,
        cold=cold,
        load_ns=r.load_ns if r else None,
        ready_ns=r.ready_ns if r else None,
        phases=r.phases if r else (),
        cancel_ns=r.cancel_ns if r else None,
        sustained=r.sustained if r else (),
        energy_j=r.energy_j if r else None,
        memory=outcome.memory,
        conditions=conditions,
        failure=outcome.failure,
    )
    return found, r.build if r else ""


def _judge_all(
    request: Request, subjects: list[Subject], growing: _Bench, progress: Progress, done: int, steps: int
) -> None:
    """Quality of each file and engine once, over logits of the checkpoint that are computed once."""
    assert request.against is not None and request.text is not None
    todo = [s for s in subjects if _judge(s) is not None]
    todo = [s for s in todo if growing.row(s.name).quality is None and growing.row(s.name).quality_failure is None]
    todo = [s for s in todo if figures.good_runs(growing.row(s.name))]
    if not todo:
        return
    checkpoint = open_checkpoint(request.against)
    length = min(WINDOW, checkpoint.config.max_position_embeddings, *(c for s in todo if (c := _most(s.path))))
    known: dict[tuple[str, tuple[str, str] | None, str | None], Outcome] = {}
    with reference_logits(checkpoint, request.text, request.tokens, length, progress.note) as folder:
        for i, s in enumerate(todo):
            progress.step(done + i, steps, f"quality: {s.name}")
            job = _job(s, request, "quality", str(folder))
            job = msgspec.structs.replace(job, context=512)
            kv = job.kv or adapter(job.adapter).kv(s.path, job.engine, None)
            key = (job.path, (job.adapter, job.engine), kv)
            if key not in known:
                known[key] = measure(job, 10 * request.timeout_s, request.memory_limit)
            outcome = known[key]
            if outcome.result is not None:
                growing.change(s.name, quality=outcome.result.quality)
            else:
                growing.change(s.name, quality_failure=outcome.failure or Failure("crashed", "it said nothing"))
    quality = next((r.quality for r in growing.b.rows if r.quality), None)
    if quality is not None and growing.b.checkpoint is not None:
        growing.b = msgspec.structs.replace(
            growing.b,
            checkpoint=msgspec.structs.replace(growing.b.checkpoint, perplexity=quality.checkpoint_perplexity),
        )


def _most(path: Path) -> int | None:
    """The context of a bundle, file or checkpoint that we know."""
    with suppress(PhiError):
        return open_package(path).context
    with suppress(PhiError):
        return open_checkpoint(path).config.max_position_embeddings
    return None


def seconds_left(began: float, done: int, steps: int) -> float | None:
    """What is left, by what was done; None before the first process ended."""
    return (time.monotonic() - began) / done * (steps - done) if done else None
