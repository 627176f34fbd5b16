"""`phi-bench compare A B`: what changed from one result to another, as a gate.

Speed counts when the interval of its ratio excludes 1. Machines drift, and a slow hour is no regression: where the
memory bandwidth probed before each run changed as well, the ratio of its medians is taken off. Memory counts when it
rises by more than 10 % and 200 MB, quality when KL divergence rises by more than twice its standard error.
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
from phi_runtime.errors import BenchmarkError

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
    """All rows that either has, by name. Raises BenchmarkError for a result that is not complete."""
    for name, result in (("the first", a), ("the second", b)):
        if not result.complete:
            raise BenchmarkError(f"{name} result is not complete: the command that began it goes on with it")
    before, after = ({r.name: r for r in x.rows} for x in (a, b))
    found: list[Change] = []
    for name in dict.fromkeys([*before, *after]):
        x, y = before.get(name), after.get(name)
        if x is None:
            found.append(Change(name, "row", "", "measured", "undecided", note="is new"))
        elif y is None:
            found.append(Change(name, "row", "measured", "", "worse", note="is gone"))
        else:
            found += _row(x, y, a, b)
    return found


def _row(x: Row, y: Row, a: Benchmark, b: Benchmark) -> list[Change]:
    old, new = failure_of(x), failure_of(y)
    if bool(old) != bool(new) or not figures.good_runs(y) or not figures.good_runs(x):
        verdict: Verdict = "same" if bool(old) == bool(new) else "worse" if new else "better"
        return [Change(x.name, "runs", old or "measured", new or "measured", verdict)]
    other = _otherwise(x, y, a, b)
    found = [
        _speed(x, y, "decode, tokens/s", _rate, other),
        _speed(x, y, "prefill, tokens/s", _prefill, other),
        _memory(x, y, other),
        _quality(x, y, a, b),
        _size(x, y, a, b),
    ]
    return [c for c in found if c is not None]


def _otherwise(x: Row, y: Row, a: Benchmark, b: Benchmark) -> str:
    """What makes speed and memory no subject of comparison, "" for nothing."""
    one, other = x.configuration, y.configuration
    pairs = {
        "processor": (a.host.cpu, b.host.cpu),
        "device": (a.host.device, b.host.device),
        "cores": (a.host.cores, b.host.cores),
        "threads": (one.threads, other.threads),
        "KV cache": (one.kv, other.kv),
        "prompt": (a.settings.prompt_tokens, b.settings.prompt_tokens),
        "tokens": (a.settings.decode_tokens, b.settings.decode_tokens),
        "depths": (a.settings.depths, b.settings.depths),
    }
    return "; ".join(f"{what}: {p} and {q}" for what, (p, q) in pairs.items() if p != q)


def _rate(run: Run) -> float | None:
    phase = figures.at(run, None)
    return figures.decode_rate(phase) if phase else None


def _prefill(run: Run) -> float | None:
    phase = next((p for p in run.phases if p.depth == 0 and p.prompt_tokens > 1), None)
    return figures.prefill_rate(phase, run) if phase else None


def _speed(x: Row, y: Row, what: str, rate: Callable[[Run], float | None], other: str) -> Change | None:
    old, new = ([(r, v) for run in figures.good_runs(row) for r, v in [(run, rate(run))] if v] for row in (x, y))
    if not old and not new:
        return None
    before, after = (f"{median(v for _, v in side):,.1f}" if side else "not measured" for side in (old, new))
    if not old or not new:
        return Change(x.name, what, before, after, "worse" if old else "better")
    was, now = [v for _, v in old], [v for _, v in new]
    ratio = median(now) / median(was)
    if other:
        return Change(x.name, what, before, after, "undecided", ratio, other)
    if min(len(was), len(now)) < LEAST_ROUNDS:
        return Change(x.name, what, before, after, "undecided", ratio, f"needs {LEAST_ROUNDS} rounds of each")
    low, high = interval(now, was)
    note, verdict = f"{low:.3f} to {high:.3f}", _outside(low, high)
    probes = [
        [r.conditions.bandwidth for r, _ in side if r.conditions and r.conditions.bandwidth] for side in (old, new)
    ]
    if verdict != "same" and all(len(p) >= LEAST_ROUNDS for p in probes):
        machine = median(probes[1]) / median(probes[0])
        if _outside(*interval(probes[1], probes[0])) == verdict and _outside(low / machine, high / machine) != verdict:
            note += f"; but the machine changed: its memory bandwidth is {machine:.2f} of before"
            verdict = "undecided"
    doubts = figures.doubts(x) + figures.doubts(y)
    if verdict == "worse" and doubts:
        note, verdict = f"{note}; not to be trusted: {doubts[0]}", "undecided"
    return Change(x.name, what, before, after, verdict, ratio, note)


def _outside(low: float, high: float) -> Verdict:
    return "worse" if high < 1 else "better" if low > 1 else "same"


def _memory(x: Row, y: Row, other: str) -> Change | None:
    old, new = figures.peak(x), figures.peak(y)
    if old is None or new is None:
        return None
    if other:
        return Change(x.name, "peak memory", mb(old.value), mb(new.value), "undecided", new.value / old.value, other)
    grown = new.value - old.value
    verdict: Verdict = "same"
    if abs(grown) > _MEMORY_BYTES and abs(grown) > _MEMORY_SHARE * old.value:
        verdict = "worse" if grown > 0 else "better"
    return Change(x.name, "peak memory", mb(old.value), mb(new.value), verdict, new.value / old.value)


def _quality(x: Row, y: Row, a: Benchmark, b: Benchmark) -> Change | None:
    if x.quality is None or y.quality is None:
        if x.quality is None:
            return None
        why = y.quality_failure.reason if y.quality_failure else "not measured"
        asked = b.settings.quality_tokens is not None
        return Change(x.name, "quality", "measured", why, "worse" if asked else "undecided")
    p, q = x.quality, y.quality
    shown = (f"{p.kld_mean:.5f}", f"{q.kld_mean:.5f}")
    ratio = q.kld_mean / p.kld_mean if p.kld_mean > 0 else None
    texts = [(z.settings.text_sha256, z.checkpoint_sha256) for z in (a, b)]
    if (p.tokens, p.window) != (q.tokens, q.window) or texts[0] != texts[1]:
        return Change(x.name, "KL divergence, nats", *shown, "undecided", ratio, "of different texts or checkpoints")
    if p.kld_error is None or q.kld_error is None:
        return Change(x.name, "KL divergence, nats", *shown, "undecided", ratio, "of one window: no standard error")
    error = math.hypot(p.kld_error, q.kld_error)
    apart = q.kld_mean - p.kld_mean
    verdict: Verdict = "same" if abs(apart) <= _ERRORS * error else "worse" if apart > 0 else "better"
    return Change(x.name, "KL divergence, nats", *shown, verdict, ratio, f"{apart:+.5f}, error {error:.5f}")


def _size(x: Row, y: Row, a: Benchmark, b: Benchmark) -> Change | None:
    """Another file under the same name is worth knowing."""
    old, new = figures.model_of(x, a), figures.model_of(y, b)
    if old.sha256 == new.sha256 or old.file_bytes is None or new.file_bytes is None:
        return None
    sizes = (mb(old.file_bytes), mb(new.file_bytes))
    return Change(x.name, "files", *sizes, "same", new.file_bytes / old.file_bytes, "not the same files")
