"""The figures that people read, from the raw samples: rates, latencies, shares of the roof.

Each is defined once, here; docs/reference/benchmark.md says the same in words.
"""

from dataclasses import dataclass
from statistics import median

import numpy as np

from phi_bench.records import Benchmark, Model, Phase, Row, Run
from phi_bench.stats import interval, spread
from phi_runtime.backends.llama_cpp import KV_TYPES

# Bits of a number in the KV cache, by type.
KV_BITS = {"f32": 32.0, "bf16": 16.0, "int8": 8.0} | {name: bits for name, (_, bits) in KV_TYPES.items()}
_MOST_SPREAD, _MOST_OTHERS, _MOST_STEAL = 0.10, 0.10, 0.02


@dataclass(frozen=True)
class Figure:
    """A median over rounds, its 95 % interval, and the values of the rounds."""

    value: float
    low: float
    high: float
    rounds: tuple[float, ...]


def figure(values: list[float]) -> Figure | None:
    """The median of some rounds; None of none."""
    return Figure(median(values), *interval(values), tuple(values)) if values else None


def good_runs(row: Row) -> list[Run]:
    """The runs that ended well."""
    return [r for r in row.runs if r.failure is None]


def decode_rate(phase: Phase) -> float | None:
    """Tokens per second after the first token."""
    if phase.token_ns:
        return 1e9 * len(phase.token_ns) / sum(phase.token_ns)
    if phase.decode_ns and phase.decode_tokens:
        return 1e9 * phase.decode_tokens / phase.decode_ns
    return None


def decode_depth(phase: Phase) -> int:
    """Tokens in the cache when the first timed token is computed."""
    return phase.depth + phase.prompt_tokens


def prefill_rate(phase: Phase, run: Run) -> float | None:
    """Tokens per second of reading a prompt. Of an engine that gives its first token's time only, what a prompt of one
    token takes is taken off: the call, one pass and the sampler.
    """
    if phase.prefill_ns:
        return 1e9 * phase.prompt_tokens / phase.prefill_ns
    one = next((p for p in run.phases if p.depth == 0 and p.prompt_tokens == 1), None)
    if phase.first_token_ns and one and one.first_token_ns and phase.prompt_tokens > 1:
        taken = phase.first_token_ns - one.first_token_ns
        return 1e9 * (phase.prompt_tokens - 1) / taken if taken > 0 else None
    return None


def decode(row: Row, depth: int | None = None) -> Figure | None:
    """Tokens per second at the phase whose depth is nearest (None: after the prompt)."""
    return figure([r for run in good_runs(row) if (p := at(run, depth)) and (r := decode_rate(p))])


def prefill(row: Row, depth: int = 0) -> Figure | None:
    """Tokens per second of reading the prompt after `depth` tokens."""
    found = []
    for run in good_runs(row):
        phase = next((p for p in run.phases if p.depth == depth and p.prompt_tokens > 1), None)
        if phase and (rate := prefill_rate(phase, run)):
            found.append(rate)
    return figure(found)


def first_token(row: Row) -> Figure | None:
    """Seconds from a prompt at an empty cache to its first token."""
    return figure(
        [
            p.first_token_ns / 1e9
            for run in good_runs(row)
            for p in run.phases
            if p.depth == 0 and p.prompt_tokens > 1 and p.first_token_ns
        ]
    )


def load(row: Row, cold: bool) -> Figure | None:
    """Seconds until the first token was computed, with the files out of the page cache or in it."""
    return figure([r.ready_ns / 1e9 for r in good_runs(row) if r.ready_ns and r.cold == cold])


def latencies(row: Row) -> tuple[float, float, float] | None:
    """Milliseconds between tokens: the 50th, 95th and 99th percentile of all rounds, at the depth of the prompt."""
    found = [t / 1e6 for run in good_runs(row) if (p := at(run, None)) for t in p.token_ns]
    if not found:
        return None
    p50, p95, p99 = (float(q) for q in np.quantile(found, [0.5, 0.95, 0.99]))
    return p50, p95, p99


def peak(row: Row) -> Figure | None:
    """The most bytes that were resident."""
    return figure([float(r.memory.peak_rss) for r in good_runs(row) if r.memory])


def cancelled(row: Row) -> Figure | None:
    """Seconds from asking a prompt's reading to stop until it had."""
    return figure([r.cancel_ns / 1e9 for r in good_runs(row) if r.cancel_ns])


def read_per_token(row: Row, model: Model, depth: int) -> float | None:
    """Bytes that decoding one token of a row reads at this depth. None where its cache's type is not known."""
    return bytes_per_token(model, depth, KV_BITS.get(row.configuration.kv or ""))


def bytes_per_token(model: Model, depth: int, kv_bits: float | None) -> float | None:
    """Bytes that decoding one token reads: weights, and the KV cache of `depth` tokens. None where one is not known."""
    if model.read_bytes is None or kv_bits is None or model.kv_numbers is None:
        return None
    return model.read_bytes + depth * model.kv_numbers * kv_bits / 8


def roof_share(row: Row, b: Benchmark) -> float | None:
    """Share of the memory bandwidth that decoding after the prompt uses."""
    model, bandwidth, rate = model_of(row, b), b.host.read_bandwidth, decode(row)
    phase = next((p for run in good_runs(row) if (p := at(run, None))), None)
    if not bandwidth or rate is None or phase is None:
        return None
    read = read_per_token(row, model, decode_depth(phase))
    return None if read is None else rate.value * read / bandwidth


def model_of(row: Row, b: Benchmark) -> Model:
    """The row's model."""
    return next(m for m in b.models if m.name == row.model)


def depths(b: Benchmark) -> list[int]:
    """All depths at which something was decoded."""
    return sorted({decode_depth(p) for row in b.rows for run in good_runs(row) for p in run.phases if decode_rate(p)})


def doubts(row: Row, depths: tuple[int, ...] = ()) -> tuple[str, ...]:
    """Why a row's figures are not to be trusted: rounds that differ, other programs, a host that took the processor;
    and which of the wanted depths it does not have.
    """
    found = []
    rates, runs = decode(row), good_runs(row)
    if rates and len(rates.rounds) > 1 and (apart := spread(rates.rounds)) > _MOST_SPREAD:
        found.append(f"the middle half of its rounds is {100 * apart:.0f} % apart")
    conditions = [r.conditions for r in runs if r.conditions]
    if conditions:
        others = max(c.others for c in conditions)
        steal = max(c.steal for c in conditions)
        if others > _MOST_OTHERS:
            found.append(f"other programs took up to {100 * others:.0f} % of the processors")
        if steal > _MOST_STEAL:
            found.append(f"the virtual machine's host took up to {100 * steal:.0f} %")
    if runs and len(runs) < 2:
        found.append("measured once")
    missing = [d for d in depths if d and runs and not any(at(run, d) for run in runs)]
    if missing:
        found.append(f"not measured after {', '.join(map(str, missing))} tokens: beyond its context")
    return tuple(found)


def ratio(row: Row, base: Row) -> Figure | None:
    """Decode rate of a row over another's of the same run, of rounds measured in turns."""
    a = {r.round: x for r in good_runs(row) if (p := at(r, None)) and (x := decode_rate(p))}
    b = {r.round: x for r in good_runs(base) if (p := at(r, None)) and (x := decode_rate(p))}
    both = sorted(a.keys() & b.keys())
    if not both:
        return None
    mine, theirs = [a[i] for i in both], [b[i] for i in both]
    each = tuple(x / y for x, y in zip(mine, theirs, strict=True))
    return Figure(median(each), *interval(mine, theirs, paired=True), each)


def at(run: Run, depth: int | None) -> Phase | None:
    """The phase that decodes at a depth (None: that of the prompt at an empty cache, or the first there is)."""
    timed = [p for p in run.phases if decode_rate(p)]
    if depth is not None:
        return next((p for p in timed if decode_depth(p) == depth), None)
    prompt = next((p.prompt_tokens for p in run.phases if p.depth == 0 and p.prompt_tokens > 1), None)
    return next((p for p in timed if decode_depth(p) == prompt), timed[0] if timed else None)
