"""Several results of `phi-bench eval` side by side, each model against the first, row by row: `phi-bench card`."""

from contextlib import suppress
from dataclasses import dataclass
from math import comb, sqrt
from pathlib import Path

import msgspec
import numpy as np

from phi_bench.evaluate.code import CodeResult
from phi_bench.evaluate.code_tasks import pass_at_k
from phi_bench.evaluate.harness import HarnessResult
from phi_runtime.errors import BenchmarkError, NotFoundError


@dataclass(frozen=True)
class Measured:
    """A metric of one model on one task, by row. asked: what two must share to be compared."""

    model: str
    digest: str
    task: str
    metric: str
    asked: str
    how: str
    values: dict[str, float]


@dataclass(frozen=True)
class Change:
    """Of a model against another on the same rows: the mean difference, its standard error over rows, and how likely
    as many rows or more would go one way if either were as good (an exact sign test over the rows that differ).
    """

    mean: float
    error: float
    p: float
    better: int
    worse: int


def read_result(path: Path) -> list[Measured]:
    """A result's metrics. Raises NotFoundError, BenchmarkError for what is none."""
    try:
        raw = path.read_bytes()
    except OSError:
        raise NotFoundError(f"{path}: no such file; give results of `phi-bench eval`") from None
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        return _of_code(path, msgspec.json.decode(raw, type=CodeResult))
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        return _of_harness(msgspec.json.decode(raw, type=HarnessResult))
    raise BenchmarkError(f"{path}: is no result of `phi-bench eval`; measure it with this version")


def _of_code(path: Path, r: CodeResult) -> list[Measured]:
    s = r.settings
    if not r.problems or any(not 1 <= score.k <= s.samples for score in r.scores):
        raise BenchmarkError(f"{path}: its problems or pass@k are none; measure it with this version")
    asked = f"{s.task_sha256} {s.problems} {s.chat} {s.post} {s.samples} {s.temperature} {s.top_p} {s.max_tokens}"
    how = f"{s.problems} problems, {s.samples} samples at temperature {s.temperature:g}, "
    how += "chat format" if s.chat else f"completion, post-processing: {s.post}"
    return [
        Measured(
            s.model,
            s.model_sha256,
            s.task,
            f"pass@{score.k}",
            asked,
            how,
            {j.task_id: pass_at_k(j.kinds.count("passed"), s.samples, score.k) for j in r.problems},
        )
        for score in r.scores
    ]


def _of_harness(r: HarnessResult) -> list[Measured]:
    asked = f"{sorted(r.files.items())} {r.shots} {r.limit} {r.version} {r.lm_eval}"
    found = []
    for m in r.metrics:
        values = {str(row.row): row.metrics[m.name] for row in r.rows if row.post == m.post and m.name in row.metrics}
        how = f"{len(values)} rows, {r.shots} shots, lm-eval {r.lm_eval}"
        how += "" if m.post == "none" else f", answers by {m.post}"
        name = m.name if m.post == "none" else f"{m.name} ({m.post})"
        if values:
            found.append(Measured(r.model, r.model_sha256, r.task, name, asked, how, values))
    return found


def change(before: dict[str, float], after: dict[str, float]) -> Change:
    """Over the rows that both have, which are all."""
    differences = np.array([after[row] - before[row] for row in before])
    n = len(differences)
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    error = float(differences.std(ddof=1) / sqrt(n)) if n > 1 else 0.0
    differing, most = better + worse, max(better, worse)
    p = min(1.0, 2 * sum(comb(differing, k) for k in range(most, differing + 1)) / 2**differing) if differing else 1.0
    return Change(float(differences.mean()), error, p, better, worse)


def card(paths: list[Path]) -> str:
    """A table in Markdown. Raises BenchmarkError for results that did not ask the same of each model, naming both."""
    tasks: dict[tuple[str, str], list[tuple[Path, Measured]]] = {}
    for path in paths:
        for m in read_result(path):
            tasks.setdefault((m.task, m.metric), []).append((path, m))
    models = list(dict.fromkeys(m.digest for found in tasks.values() for _, m in found))
    names = {m.digest: m.model for found in tasks.values() for _, m in found}
    if len({*names.values()}) < len(names):
        names = {digest: f"{name} {digest[:8]}" for digest, name in names.items()}
    head = ["task", "metric", *(names[d] for d in models)]
    head += [f"{names[d]} - {names[models[0]]}" for d in models[1:]]
    rows, notes = [], []
    for (task, metric), found in tasks.items():
        by_model = _by_model(found)
        first = by_model.get(models[0])
        cells = [_score(by_model.get(d)) for d in models]
        cells += [_difference(first, by_model.get(d)) for d in models[1:]]
        rows.append([task, metric, *cells])
        note = f"- {_cell(task)}: {_cell(found[0][1].how)}"
        notes += [] if note in notes else [note]
    lines = ["| " + " | ".join(map(_cell, r)) + " |" for r in [head, ["---"] * len(head), *rows]]
    return "\n".join(
        [
            *lines,
            "",
            "± is the standard error over rows; of a difference, over the rows' differences. p: of a sign test over",
            "the rows that differ.",
            "",
            *notes,
            "",
        ]
    )


def _cell(text: str) -> str:
    """A name from a file as one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|")


def _by_model(found: list[tuple[Path, Measured]]) -> dict[str, Measured]:
    first_path, first = found[0]
    by_model: dict[str, Measured] = {}
    for path, m in found:
        if m.asked != first.asked or m.values.keys() != first.values.keys():
            raise BenchmarkError(
                f"{path}: asked other than {first_path} of {m.task} (rows, shots, settings or version); "
                "evaluate both in the same way"
            )
        if m.digest in by_model:
            raise BenchmarkError(f"{path}: is of a model and task that another result has; leave one out")
        by_model[m.digest] = m
    return by_model


def _score(m: Measured | None) -> str:
    if m is None:
        return "-"
    values = np.array(list(m.values.values()))
    error = values.std(ddof=1) / sqrt(len(values)) if len(values) > 1 else 0.0
    return f"{values.mean():.1%} ± {error:.1%}"


def _difference(first: Measured | None, m: Measured | None) -> str:
    if first is None or m is None:
        return "-"
    c = change(first.values, m.values)
    return f"{100 * c.mean:+.1f} ± {100 * c.error:.1f} points (p {c.p:.2g}; {c.better} better, {c.worse} worse)"
