"""The papers' tasks by lm-eval's own definitions, on rows from a file: `phi-bench eval --task arc_easy=FILE`."""

import difflib
import json
import logging
import os
import tempfile
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

from phi_bench.evaluate.code_tasks import TASKS
from phi_bench.measure.models import describe
from phi_runtime.contract import Contract, encode
from phi_runtime.errors import BenchmarkError, NotFoundError, OutputExistsError, missing_extra
from phi_runtime.files import sha256, write_file
from phi_runtime.version import __version__

SPLITS = ("train", "validation", "test")


class Metric(Contract, frozen=True):
    """A score with its standard error over rows, if lm-eval gives one. post: what was done to answers first."""

    name: str
    post: str
    value: float
    error: float | None


class Scored(Contract, frozen=True):
    """A row: its number in the file's order, and its metrics, for each thing that is done to answers first."""

    row: int
    post: str
    metrics: dict[str, float]
    answers: tuple[str, ...]


class HarnessResult(Contract, frozen=True):
    """A whole evaluation; `prompt` is the first row's as the model reads it."""

    model: str
    model_sha256: str
    task: str
    version: str
    files: dict[str, str]
    shots: int
    limit: int | None
    kv: str | None
    lm_eval: str
    metrics: tuple[Metric, ...]
    prompt: str
    rows: tuple[Scored, ...]


@dataclass(frozen=True)
class Request:
    """What is asked for. task: NAME=FILE, or NAME=FOLDER with train.jsonl, validation.jsonl, test.jsonl. shots:
    examples before each row, the task's own number by default. kv: type of the cache, the engine's own by default.
    """

    model: Path
    task: str
    shots: int | None = None
    limit: int | None = None
    threads: int | None = None
    kv: str | None = None


def evaluate(asked: Request, out: Path, force: bool = False) -> HarnessResult:
    """Write OUT; the model's answers so far are kept in OUT.requests, from where the same call goes on.

    Raises BenchmarkError for an unknown task (naming the nearest) and for rows that do not fit it, NotFoundError,
    OutputExistsError, MissingExtraError, and what opening the model raises.
    """
    name, _, place = asked.task.partition("=")
    if out.exists() and not force:
        raise OutputExistsError(f"{out}: exists already; name another file, or replace it with --force")
    files = _files(name, place)
    # Nothing is fetched: what is missing is to be said at once. lm-eval's imports read these.
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1")
    try:
        import lm_eval
        from lm_eval.evaluator import simple_evaluate
    except ImportError as e:
        raise missing_extra(e, "eval") from None
    from phi_bench.evaluate.models import PhiLM, open_scorer
    from phi_train.teacher.cache import RequestCache

    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    tasks = _known_tasks()
    if name not in tasks.all_subtasks:
        near = difflib.get_close_matches(name, [*TASKS, *tasks.all_subtasks], 1)
        raise BenchmarkError(f"lm-eval has no task {name!r}" + (f"; did you mean {near[0]}?" if near else ""))
    digest = describe(asked.model, asked.model.name).sha256
    kept = out.with_name(out.name + ".requests")
    scorer = open_scorer(asked.model, asked.threads, asked.kv)
    try:
        with (
            tempfile.TemporaryDirectory() as cache,
            RequestCache(kept, f"{digest} {__version__} {asked.kv}", force) as requests,
        ):
            data = {"data_files": {s: str(p.resolve()) for s, p in files.items()}, "cache_dir": cache}
            task = {"task": name, "dataset_path": "json", "dataset_name": None, "dataset_kwargs": data}
            found = _run(simple_evaluate, PhiLM(scorer, requests), {"group": "phi", "task": [task]}, asked, tasks)
    finally:
        scorer.close()
    digests = {p: sha256(p) for p in set(files.values())}
    result = _result(found, asked, name, digest, {s: digests[p] for s, p in files.items()}, lm_eval.__version__)
    write_file(out, encode(result) + "\n")
    kept.unlink()
    return result


@cache
def _known_tasks() -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager()  # reads thousands of files, which takes seconds


def _files(name: str, place: str) -> dict[str, Path]:
    """By split; a single file stands for all of them."""
    if not place:
        raise BenchmarkError(
            f"--task {name} needs its rows: {name}=FILE with the JSON lines of its test set, or {name}=FOLDER with "
            f"{', '.join(f'{s}.jsonl' for s in SPLITS)}"
        )
    path = Path(place)
    found = {s: path / f"{s}.jsonl" for s in SPLITS} if path.is_dir() else dict.fromkeys(SPLITS, path)
    found = {s: p for s, p in found.items() if p.is_file()}
    if not found:
        what = "has none of train.jsonl, validation.jsonl, test.jsonl" if path.is_dir() else "no such file"
        raise NotFoundError(f"{path}: {what}; give the rows of {name} as JSON lines")
    for file in set(found.values()):
        _check_rows(file, name)
    return found


def _check_rows(file: Path, name: str) -> None:
    """Each line is an object; what its fields are, the task finds out."""
    count = 0
    with open(file, "rb") as f:
        for count, line in enumerate(f, 1):
            try:
                is_row = isinstance(json.loads(line), dict)
            except (ValueError, RecursionError):
                is_row = False
            if not is_row:
                raise BenchmarkError(f"{file}: does not fit the task {name}: line {count} is no JSON object")
    if count == 0:
        raise BenchmarkError(f"{file}: does not fit the task {name}: it has no rows")


def _run(simple_evaluate: Any, lm: Any, group: dict[str, Any], asked: Request, tasks: Any) -> dict[str, Any]:
    own: tuple[type[Exception], ...] = (ValueError, KeyError, TypeError, IndexError, AssertionError)
    unfit = own + _foreign_errors()
    try:
        found = simple_evaluate(
            lm, tasks=[group], num_fewshot=asked.shots, limit=asked.limit, task_manager=tasks, bootstrap_iters=1000
        )
    except unfit as e:
        name, _, place = asked.task.partition("=")
        said = " ".join(str(e).split())[:200] or type(e).__name__
        raise BenchmarkError(
            f"{place}: does not fit the task {name} ({said}); give the rows as the task has them"
        ) from e
    assert found is not None
    return dict(found)


def _foreign_errors() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetsError

    return DatasetsError, import_module("jinja2.exceptions").TemplateError  # of lm-eval's own templates


def _result(
    found: dict[str, Any], asked: Request, name: str, digest: str, files: dict[str, str], lm_eval: str
) -> HarnessResult:
    metrics, values = [], found["results"][name]
    for key, value in values.items():
        metric, _, post = key.partition(",")
        if post and not metric.endswith("_stderr") and isinstance(value, (int, float)):
            error = values.get(f"{metric}_stderr,{post}")
            metrics.append(Metric(metric, post, float(value), error if isinstance(error, float) else None))
    samples = found["samples"][name]
    names = {m.name for m in metrics}
    rows = [
        Scored(
            row=int(s["doc_id"]),
            post=str(s["filter"]),
            metrics={k: float(v) for k, v in s.items() if k in names and isinstance(v, (int, float))},
            answers=tuple(str(r[0] if isinstance(r, (list, tuple)) else r) for r in s["filtered_resps"]),
        )
        for s in samples
    ]
    return HarnessResult(
        model=asked.model.name,
        model_sha256=digest,
        task=name,
        version=str(found["versions"].get(name, "")),
        files=files,
        shots=int(found["n-shot"].get(name, 0)),
        limit=asked.limit,
        kv=asked.kv,
        lm_eval=lm_eval,
        metrics=tuple(metrics),
        prompt=str(samples[0]["arguments"][0][0]),
        rows=tuple(sorted(rows, key=lambda r: (r.row, r.post))),
    )
