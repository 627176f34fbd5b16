"""`phi-bench run`: every row in turn, round after round, each in a process of its own.

The result file is written after each process. One that a kill left incomplete is taken up by the same command.
"""

import datetime
import time
from pathlib import Path

import msgspec

from phi_bench import figures
from phi_bench.adapters import adapter
from phi_bench.measure import host
from phi_bench.measure.checkpoint import describe_checkpoint
from phi_bench.measure.job import job
from phi_bench.measure.journal import Journal, begun
from phi_bench.measure.judge import judge, judge_all
from phi_bench.measure.models import files
from phi_bench.measure.process import measure
from phi_bench.measure.request import Progress, Request, settings
from phi_bench.measure.subjects import Subject, check_architecture, given, predict, subjects
from phi_bench.records import Benchmark, Conditions, Model, Row, Run, Settings
from phi_export.verify.text import sample_tokens
from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.errors import BenchmarkError

_MOST_SWAPPED = 64 << 20  # bytes in one run; a machine that swaps measures its disk
_SAMPLE_CONTEXT = 256
_GUESS = {"start": 4.0, "read": 5e8, "prefill": 8.0}  # seconds, bytes per second, times decoding's speed


def run(request: Request, out: Path, progress: Progress | None = None) -> Benchmark:
    """Measure, and keep the result in `out`.

    Raises UsageError, NotFoundError and CheckpointError before anything is measured, OutputExistsError where `out`
    holds something else, BenchmarkError for a machine that swaps: what was measured until then is kept.
    """
    progress = progress or Progress()
    how = settings(request, [given(said).path for said in request.models], progress)
    rows, models = subjects(request, how, progress)
    fresh = _fresh(request, how, rows, models, progress)
    b = begun(out, fresh, request.force)
    if b is not fresh:
        progress.note(f"going on with {out}: {sum(len(r.runs) for r in b.rows)} runs are there")
    return _measure_all(request, rows, Journal(b, out), progress)


def _fresh(request: Request, how: Settings, rows: list[Subject], models: list[Model], progress: Progress) -> Benchmark:
    """A benchmark of which nothing is measured yet."""
    checkpoint = None
    if request.against is not None:
        opened = open_checkpoint(request.against)
        progress.note("digesting the checkpoint")
        check_architecture(opened, rows)
        sample_tokens(opened, request.text, request.tokens)  # raises for a text that gives none
        checkpoint = describe_checkpoint(opened)
    packages = {name for r in rows for name in adapter(r.configuration.adapter).packages}
    return Benchmark(
        datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        False,
        host.host(),
        host.software(sorted(packages)),
        how,
        tuple(models),
        tuple(Row(r.name, r.model, r.configuration, predicted=predict(r)) for r in rows),
        checkpoint,
    )


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


def _measure_all(request: Request, rows: list[Subject], journal: Journal, progress: Progress) -> Benchmark:
    how = journal.b.settings
    judged = sum(judge(r) is not None for r in rows) if request.against else 0
    spoken = [r for r in rows if _speaks(r, journal.b)]
    steps = len(rows) * how.rounds + judged + len(spoken)
    progress.estimated(estimate(journal.b), steps)
    done = 0
    for number in range(1, how.rounds + 1):
        for r in rows:
            row = journal.row(r.name)
            if not any(x.failure is not None or x.round == number for x in row.runs):
                progress.step(done, steps, f"round {number} of {how.rounds}: {r.name}")
                found, build = _run_once(r, how, number)
                journal.change(r.name, runs=(*row.runs, found), build=build or row.build)
                _check_swap(found.conditions, journal)
            done += 1
    if request.against is not None and request.text is not None:
        judge_all(rows, request.against, request.text, journal, progress, done, steps)
    done += judged
    for r in spoken:
        row = journal.row(r.name)
        if not row.samples and figures.good_runs(row):
            progress.step(done, steps, f"samples: {r.name}")
            asked = job("samples", r.path, r.configuration, how)
            asked = msgspec.structs.replace(asked, context=max(asked.context, _SAMPLE_CONTEXT))
            outcome = measure(asked, how.timeout_s, how.memory_limit)
            if outcome.result is not None:
                journal.change(r.name, samples=outcome.result.samples)
        done += 1
    return journal.finish(complete=True)


def _speaks(r: Subject, b: Benchmark) -> bool:
    """Whether what a row's model writes is of interest: random weights write nothing."""
    random = next(m.random_weights for m in b.models if m.name == r.model)
    return r.configuration.adapter == "phi-run" and not random


def _check_swap(conditions: Conditions | None, journal: Journal) -> None:
    if conditions is not None and conditions.swapped > _MOST_SWAPPED:
        journal.finish()
        raise BenchmarkError(
            f"the machine swaps ({conditions.swapped / 1e6:.0f} MB in one run): what it measures is its disk; "
            f"free memory or leave out the largest model; the rows so far are in {journal.out}"
        )


def _run_once(s: Subject, how: Settings, number: int) -> tuple[Run, str]:
    """One process, and how its engine was built. In the first round the model's files are out of the page cache, where
    the system allows that.
    """
    cold = number == 1 and host.drop_cached(files(s.path))
    began = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    watch = host.Watch(s.configuration.threads)
    outcome = measure(job("speed", s.path, s.configuration, how), how.timeout_s + how.sustained_s, how.memory_limit)
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


def seconds_left(began: float, done: int, steps: int) -> float | None:
    """What is left, by what was done; None before the first process ended."""
    return (time.monotonic() - began) / done * (steps - done) if done else None
