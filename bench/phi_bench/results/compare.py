"""`phi-bench compare A B`: what changed from one result to another, as a gate.

Speed counts when the interval of its ratio excludes 1. Machines drift, and a slow hour is no regression: rows of other
projects' engines that are the same in both results say how the machine changed, and that is taken off. Without such
rows the memory bandwidth that was probed before each run is asked. Memory counts when it
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
from phi_bench.stats import change
from phi_runtime.errors import BenchmarkError

Rate = Callable[[Run], float | None]
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
    controls = Controls(a, b)
    found: list[Change] = []
    for name in dict.fromkeys([*before, *after]):
        x, y = before.get(name), after.get(name)
        if x is None:
            found.append(Change(name, "row", "", "measured", "undecided", note="is new"))
        elif y is None:
            found.append(Change(name, "row", "measured", "", "worse", note="is gone"))
        else:
            found += _row(x, y, a, b, controls)
    return found


def _row(x: Row, y: Row, a: Benchmark, b: Benchmark, controls: "Controls") -> list[Change]:
    old, new = failure_of(x), failure_of(y)
    if bool(old) != bool(new) or not figures.good_runs(y) or not figures.good_runs(x):
        verdict: Verdict = "same" if bool(old) == bool(new) else "worse" if new else "better"
        return [Change(x.name, "runs", old or "measured", new or "measured", verdict)]
    other = _otherwise(x, y, a, b)
    found = [
        _speed(x, y, "decode, tokens/s", _rate, controls, other),
        _speed(x, y, "prefill, tokens/s", _prefill, controls, other),
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


def _bandwidth(run: Run) -> float | None:
    return run.conditions.bandwidth if run.conditions else None


def _rate(run: Run) -> float | None:
    phase = figures.at(run, None)
    return figures.decode_rate(phase) if phase else None


def _prefill(run: Run) -> float | None:
    phase = next((p for p in run.phases if p.depth == 0 and p.prompt_tokens > 1), None)
    return figures.prefill_rate(phase, run) if phase else None


def _speed(x: Row, y: Row, what: str, rate: Rate, controls: "Controls", other: str) -> Change | None:
    old, new = rates(x, rate), rates(y, rate)
    if not old and not new:
        return None
    before, after = (f"{median(side.values()):,.1f}" if side else "not measured" for side in (old, new))
    if not old or not new:
        return Change(x.name, what, before, after, "worse" if old else "better")
    ratio = median(new.values()) / median(old.values())
    if other:
        return Change(x.name, what, before, after, "undecided", ratio, other)
    found = change(list(old.values()), list(new.values()))
    if found is None or min(len(old), len(new)) < LEAST_ROUNDS:
        return Change(x.name, what, before, after, "undecided", ratio, f"needs {LEAST_ROUNDS} rounds of each")
    ratio, low, high = found
    note, verdict = f"{low:.3f} to {high:.3f}", _outside(low, high)
    beside = controls.change(x, rate, old, new)
    if beside is not None:
        ratio, low, high = beside
        note, verdict = f"{low:.3f} to {high:.3f} beside {controls.named(x)}", _outside(low, high)
    elif verdict != "same":
        machine = change(*(list(rates(row, _bandwidth).values()) for row in (x, y)))
        if machine and _outside(*machine[1:]) == verdict and _outside(low / machine[0], high / machine[0]) != verdict:
            note += f"; but the machine changed: its memory bandwidth is {machine[0]:.2f} of before"
            verdict = "undecided"
    doubts = () if beside is not None else figures.doubts(x) + figures.doubts(y)
    if verdict == "worse" and doubts:
        note, verdict = f"{note}; not to be trusted: {doubts[0]}", "undecided"
    return Change(x.name, what, before, after, verdict, ratio, note)


def rates(row: Row, rate: Rate) -> dict[int, float]:
    """By round, of those that ended well."""
    return {run.round: v for run in figures.good_runs(row) for v in [rate(run)] if v}


class Controls:
    """Rows of other projects' engines that are the same in both results, files and versions: what they say of the
    machine is taken off, round by round, since rows take turns.
    """

    def __init__(self, a: Benchmark, b: Benchmark) -> None:
        after = {row.name: row for row in b.rows}
        self._pairs = [
            (x, y)
            for x in a.rows
            if (y := after.get(x.name)) is not None
            and x.configuration.adapter != "phi-run"
            and x.configuration == y.configuration
            and figures.good_runs(x)
            and figures.good_runs(y)
            and figures.model_of(x, a).sha256 == figures.model_of(y, b).sha256
        ]

    def named(self, row: Row) -> str:
        """Those for a row."""
        return ", ".join(x.name for x, _ in self._pairs if x.name != row.name)

    def change(
        self, row: Row, rate: Rate, old: dict[int, float], new: dict[int, float]
    ) -> tuple[float, float, float] | None:
        """As `stats.change`, of the rates over the controls' (geometric mean). None without a control."""
        pairs = [(x, y) for x, y in self._pairs if x.name != row.name]
        if not pairs:
            return None
        before, after = (_over(mine, [rates(pair[i], rate) for pair in pairs]) for i, mine in enumerate((old, new)))
        return change(before, after) if min(len(before), len(after)) >= LEAST_ROUNDS else None


def _over(mine: dict[int, float], others: list[dict[int, float]]) -> list[float]:
    rounds = [n for n in mine if all(n in o for o in others)]
    return [mine[n] / math.exp(sum(math.log(o[n]) for o in others) / len(others)) for n in rounds]


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
