"""`phi-bench compare A B`: what changed from one result to another, as a gate.

Speed counts when the interval of its ratio excludes 1, as measured and with both divided by the memory bandwidth that
was probed before each run: machines drift, and a slow hour is no regression. Memory counts when it rises by more than
10 % and 200 MB, quality when KL divergence rises by more than twice its standard error.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Literal

from phi_bench import figures
from phi_bench.records import Benchmark, Row, Run
from phi_bench.results.tables import failure_of, mb
from phi_bench.stats import interval

Verdict = Literal["better", "same", "worse", "undecided"]
LEAST_ROUNDS = 4  # fewer cannot tell: two sets of three fall apart by chance in one of ten cases
_MEMORY_SHARE, _MEMORY_BYTES = 0.10, 200e6
_ERRORS = 2.0


@dataclass(frozen=True)
class Change:
    """One figure of one row. ratio: B's over A's, None where it has none."""

    row: str
    what: str
    before: str
    after: str
    verdict: Verdict
    ratio: float | None = None
    note: str = ""


def compare(a: Benchmark, b: Benchmark) -> list[Change]:
    """All rows that either has, by name."""
    before, after = ({r.name: r for r in x.rows} for x in (a, b))
    found: list[Change] = []
    for name in dict.fromkeys([*before, *after]):
        x, y = before.get(name), after.get(name)
        if x is None or y is None:
            here, there = ("", "measured") if x is None else ("measured", "")
            found.append(Change(name, "row", here, there, "undecided", note="is in one of them only"))
            continue
        found += _row(x, y, a, b)
    return found


def _row(x: Row, y: Row, a: Benchmark, b: Benchmark) -> list[Change]:
    if not figures.good_runs(y) or not figures.good_runs(x):
        broke, mended = bool(figures.good_runs(x)), bool(figures.good_runs(y))
        verdict: Verdict = "worse" if broke else "better" if mended else "same"
        return [Change(x.name, "runs", failure_of(x) or "measured", failure_of(y) or "measured", verdict)]
    found = [
        _speed(x, y, "decode, tokens/s", _rate),
        _speed(x, y, "prefill, tokens/s", _prefill),
        _memory(x, y),
        _quality(x, y),
        _size(x, y, a, b),
    ]
    return [c for c in found if c is not None]


def _rate(run: Run) -> float | None:
    phase = figures.at(run, None)
    return figures.decode_rate(phase) if phase else None


def _prefill(run: Run) -> float | None:
    phase = next((p for p in run.phases if p.depth == 0 and p.prompt_tokens > 1), None)
    return figures.prefill_rate(phase, run) if phase else None


def _speed(x: Row, y: Row, what: str, rate: Callable[[Run], float | None]) -> Change | None:
    old, new = ([(r, v) for run in figures.good_runs(row) for r, v in [(run, rate(run))] if v] for row in (x, y))
    if not old or not new:
        return None
    was, now = [v for _, v in old], [v for _, v in new]
    ratio = median(now) / median(was)
    shown = (f"{median(was):,.1f}", f"{median(now):,.1f}")
    if min(len(was), len(now)) < LEAST_ROUNDS:
        return Change(x.name, what, *shown, "undecided", ratio, f"needs {LEAST_ROUNDS} rounds of each")
    low, high = interval(now, was)
    note = f"{low:.3f} to {high:.3f}"
    verdict = _outside(low, high)
    before, after = _by_bandwidth(old), _by_bandwidth(new)
    if verdict != "same" and before and after:
        low, high = interval(after, before)
        note += f"; by bandwidth {low:.3f} to {high:.3f}"
        if _outside(low, high) != verdict:
            note += ": the machine changed, not the program"
            verdict = "undecided"
    return Change(x.name, what, *shown, verdict, ratio, note)


def _by_bandwidth(measured: list[tuple[Run, float]]) -> list[float] | None:
    """Rates over the memory bandwidth probed before each; None where one was not."""
    found = [v / r.conditions.bandwidth for r, v in measured if r.conditions and r.conditions.bandwidth]
    return found if len(found) == len(measured) else None


def _outside(low: float, high: float) -> Verdict:
    return "worse" if high < 1 else "better" if low > 1 else "same"


def _memory(x: Row, y: Row) -> Change | None:
    old, new = figures.peak(x), figures.peak(y)
    if old is None or new is None:
        return None
    grown = new.value - old.value
    verdict: Verdict = "same"
    if abs(grown) > _MEMORY_BYTES and abs(grown) > _MEMORY_SHARE * old.value:
        verdict = "worse" if grown > 0 else "better"
    return Change(x.name, "peak memory", mb(old.value), mb(new.value), verdict, new.value / old.value)


def _quality(x: Row, y: Row) -> Change | None:
    if x.quality is None or y.quality is None:
        if x.quality is not None and y.quality_failure is not None:
            return Change(x.name, "quality", "measured", y.quality_failure.reason, "worse")
        return None
    p, q = x.quality, y.quality
    shown = (f"{p.kld_mean:.5f}", f"{q.kld_mean:.5f}")
    ratio = q.kld_mean / p.kld_mean if p.kld_mean > 0 else None
    if (p.tokens, p.window) != (q.tokens, q.window):
        return Change(x.name, "KL divergence, nats", *shown, "undecided", ratio, "of different texts")
    if p.kld_error is None or q.kld_error is None:
        return Change(x.name, "KL divergence, nats", *shown, "undecided", ratio, "of one window: no standard error")
    error = math.hypot(p.kld_error, q.kld_error)
    apart = q.kld_mean - p.kld_mean
    verdict: Verdict = "same" if abs(apart) <= _ERRORS * error else "worse" if apart > 0 else "better"
    return Change(x.name, "KL divergence, nats", *shown, verdict, ratio, f"{apart:+.5f}, error {error:.5f}")


def _size(x: Row, y: Row, a: Benchmark, b: Benchmark) -> Change | None:
    """Another file under the same name is worth knowing."""
    old, new = figures.model_of(x, a), figures.model_of(y, b)
    if old.sha256 == new.sha256:
        return None
    sizes = (mb(old.file_bytes), mb(new.file_bytes))
    return Change(x.name, "files", *sizes, "same", new.file_bytes / old.file_bytes, "not the same files")
