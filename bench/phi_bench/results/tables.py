"""The figures as a table: for a terminal, as Markdown, as CSV."""

import csv
import io
import re
from dataclasses import dataclass, replace
from html import escape

from phi_bench import figures
from phi_bench.figures import Figure
from phi_bench.records import Benchmark, Row


@dataclass(frozen=True)
class Cell:
    """A value: in words, and the number to sort by. note: its interval, or what is behind it."""

    text: str
    number: float | None = None
    note: str = ""


# Key, heading, unit. Predictions stand apart from what was measured.
COLUMNS = (
    ("row", "model and engine", ""),
    ("size", "size", "bytes"),
    ("bits", "bits/weight", ""),
    ("decode", "decode", "tokens/s"),
    ("ratio", "decode, of row 1", ""),
    ("prefill", "prefill", "tokens/s"),
    ("ttft", "first token", "s"),
    ("p50", "between tokens, 50 %", "ms"),
    ("p95", "between tokens, 95 %", "ms"),
    ("p99", "between tokens, 99 %", "ms"),
    ("cold", "load, cold", "s"),
    ("warm", "load, warm", "s"),
    ("cancel", "cancel", "s"),
    ("peak", "peak memory", "bytes"),
    ("roof", "share of bandwidth", ""),
    ("perplexity", "perplexity", ""),
    ("kld", "KL divergence", "nats"),
    ("top1", "same top token", ""),
    ("predicted_decode", "predicted decode", "tokens/s"),
    ("predicted_peak", "predicted peak", "bytes"),
    ("notes", "notes", ""),
)
# What a terminal has room for, under short headings; the notes follow below the table.
_TERMINAL = {
    "row": "row",
    "size": "size",
    "decode": "decode tok/s",
    "ratio": "decode of row 1",
    "prefill": "prefill tok/s",
    "peak": "peak memory",
    "roof": "of bandwidth",
    "perplexity": "perplexity",
    "kld": "KL, nats",
}
KEYS = tuple(key for key, _, _ in COLUMNS)


def mb(count: float) -> str:
    """Bytes in MB (1e6), or in GB (1e9) and GiB (2**30) from one on."""
    return f"{count / 1e6:.1f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB ({count / 2**30:.2f} GiB)"


def plain(text: str) -> str:
    """Without what a terminal would obey: a result may come from anywhere."""
    return re.sub(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]", " ", text)


def failure_of(row: Row) -> str:
    """Why a row has no figures, "" where it has."""
    failed = next((r.failure for r in row.runs if r.failure), None)
    if failed is None:
        return "" if figures.good_runs(row) else "not measured yet"
    status = f", exit status {failed.exit_status}" if failed.exit_status else ""
    return f"{failed.reason}{f' ({failed.signal})' if failed.signal else ''}{status}: {failed.detail}"


def cells(row: Row, b: Benchmark) -> dict[str, Cell]:
    """A row, by the keys of `COLUMNS`; an empty cell where something was not measured."""
    m = figures.model_of(row, b)
    found = {key: Cell("") for key in KEYS}
    found["row"] = Cell(row.name)
    if m.file_bytes is not None:
        found["size"] = Cell(mb(m.file_bytes), m.file_bytes)
    if m.bits_per_weight is not None:
        found["bits"] = Cell(f"{m.bits_per_weight:.2f}", m.bits_per_weight)
    found["decode"] = _cell(figures.decode(row), 1)
    phase = next((p for run in figures.good_runs(row) if (p := figures.at(run, None))), None)
    if phase is not None and (depth := figures.decode_depth(phase)) != b.settings.prompt_tokens:
        found["decode"] = replace(found["decode"], note=f"{found['decode'].note} after {depth} tokens".strip())
    if row is not b.rows[0]:
        found["ratio"] = _cell(figures.ratio(row, b.rows[0]), 2, "x")
    found["prefill"] = _cell(figures.prefill(row), 0)
    found["ttft"] = _cell(figures.first_token(row), 3)
    if between := figures.latencies(row):
        for key, value in zip(("p50", "p95", "p99"), between, strict=True):
            found[key] = Cell(f"{value:.1f}", value)
    found["cold"], found["warm"] = _cell(figures.load(row, True), 2), _cell(figures.load(row, False), 2)
    found["cancel"] = _cell(figures.cancelled(row), 3)
    if peak := figures.peak(row):
        found["peak"] = Cell(mb(peak.value), peak.value)
    if (share := figures.roof_share(row, b)) is not None:
        found["roof"] = Cell(f"{100 * share:.0f} %", share)
    if q := row.quality:
        rise = q.perplexity / q.checkpoint_perplexity - 1
        error = "" if q.kld_error is None else f"+- {q.kld_error:.4f}"
        found["perplexity"] = Cell(f"{q.perplexity:.3f}", q.perplexity, f"{100 * rise:+.1f} %")
        found["kld"] = Cell(f"{q.kld_mean:.4f}", q.kld_mean, error)
        found["top1"] = Cell(f"{100 * q.top1_agreement:.1f} %", q.top1_agreement)
    if predicted := row.predicted:
        most = predicted.peak_bytes
        found["predicted_peak"] = _predicted(most, mb(most), found["peak"].number)
        if predicted.tokens_per_second is not None:
            said = predicted.tokens_per_second
            found["predicted_decode"] = _predicted(said, f"{said:.1f}", found["decode"].number)
    notes = [failure_of(row), *(row.doubts or figures.doubts(row, b.settings.depths))]
    if row.quality_failure:
        notes.append(f"quality: {row.quality_failure.reason}: {row.quality_failure.detail}")
    if m.random_weights:
        notes.append("random weights: its quality means nothing")
    found["notes"] = Cell("; ".join(filter(None, notes)))
    return found


def _cell(f: Figure | None, digits: int, unit: str = "") -> Cell:
    if f is None:
        return Cell("")
    note = f"{f.low:,.{digits}f} to {f.high:,.{digits}f}" if len(f.rounds) > 1 else ""
    return Cell(f"{f.value:,.{digits}f}{unit}", f.value, note)


def _predicted(value: float, text: str, measured: float | None) -> Cell:
    return Cell(text, value, f"{100 * (value / measured - 1):+.1f} %" if measured else "")


def used(b: Benchmark) -> list[str]:
    """The columns that hold something in some row."""
    every = [cells(row, b) for row in b.rows]
    return [key for key in KEYS if any(c[key].text for c in every)]


def heading(key: str) -> str:
    """Of a column, with its unit."""
    name, unit = next((name, unit) for k, name, unit in COLUMNS if k == key)
    return f"{name}, {unit}" if unit and unit != "bytes" else name


def terminal_rows(b: Benchmark) -> tuple[list[str], list[list[str]], list[str]]:
    """Headings, rows and notes of what a terminal has room for."""
    every = [cells(row, b) for row in b.rows]
    shown = [key for key in used(b) if key in _TERMINAL]
    rows = [[f"{i}. {c['row'].text}", *(c[k].text for k in shown[1:])] for i, c in enumerate(every, 1)]
    notes = [f"{i}. {c['notes'].text}" for i, c in enumerate(every, 1) if c["notes"].text]
    return [_TERMINAL[k] for k in shown], rows, notes


def markdown(b: Benchmark, keys: tuple[str, ...] = KEYS) -> str:
    """A table of the columns that hold something, intervals in brackets, and below it what it was measured on."""
    shown = [key for key in used(b) if key in keys]
    lines = ["| " + " | ".join(heading(k) for k in shown) + " |", "|" + "---|" * len(shown)]
    for row in b.rows:
        found = cells(row, b)
        said = [c.text + (f" ({c.note})" if c.note else "") for c in (found[k] for k in shown)]
        lines.append("| " + " | ".join(escape(plain(t), quote=False).replace("|", "\\|") for t in said) + " |")
    return "\n".join(lines) + f"\n\n{machine_line(b)}\n\n{method_line(b)}\n"


def csv_text(b: Benchmark) -> str:
    """One line a row, plain numbers: bytes, tokens per second, seconds, nats."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*KEYS, "adapter", "engine", "threads", "sha256"])
    for row in b.rows:
        found, c = cells(row, b), row.configuration
        values = [found[k].text if found[k].number is None else found[k].number for k in KEYS]
        writer.writerow([*values, c.adapter, c.engine, c.threads, figures.model_of(row, b).sha256])
    return out.getvalue()


def machine_line(b: Benchmark) -> str:
    """The machine in a sentence."""
    h, s = b.host, b.software
    bandwidth = f", reads {h.read_bandwidth / 1e9:.1f} GB/s" if h.read_bandwidth else ""
    simd = f" ({', '.join(h.simd)})" if h.simd else ""
    name = h.device or h.cpu
    python = f", Python {s.python}" if s.python else ""
    cores = f", {h.cores} cores{simd}" if h.cores else ""
    memory = f", {h.memory_bytes / 1e9:.1f} GB ({h.memory_bytes / 2**30:.1f} GiB) of memory" if h.memory_bytes else ""
    return f"{name}{cores}{memory}{bandwidth}, {h.system}{python}, phi-edge {s.phi_edge}, {b.created[:10]}"


def method_line(b: Benchmark) -> str:
    """How it was measured, in a sentence."""
    s = b.settings
    spread = "95 % bootstrap intervals" if s.rounds > 3 else "the range of the rounds"
    quality = (
        f" Quality: the first {s.quality_tokens:,} tokens of the text, read in windows from an empty context, against "
        "the checkpoint's weights in float32 arithmetic."
        if s.quality_tokens
        else ""
    )
    return (
        f"Medians of {s.rounds} rounds in turn, each in a process of its own, with {spread}: a prompt of "
        f"{s.prompt_tokens} tokens, then {s.decode_tokens} generated, greedily. Peak memory is the whole process, "
        f"seen from outside.{quality}"
    )
