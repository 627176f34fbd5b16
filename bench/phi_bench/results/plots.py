"""The report's pictures: inline SVG that takes its text colour from the page, light or dark.

Rows are told apart by number and by shape, not by colour alone.
"""

import io
from statistics import median

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from phi_bench import figures
from phi_bench.records import Benchmark, LossAt, Row
from phi_train.trainer.summary import Summary

# Matplotlib wants a colour; this one is replaced by the page's own.
_INK = "#010203"
# Of Okabe and Ito's palette, which is told apart without seeing red or green; on light and on dark.
_COLOURS = ("#d55e00", "#0072b2", "#009e73", "#cc79a7", "#b8860b", "#56b4e9", "#8a8f98")
_SHAPES = ("o", "s", "^", "D", "v", "P", "X", "*")
_SIZE = (4.6, 3.2)


def all_plots(b: Benchmark) -> dict[str, tuple[str, str]]:
    """By heading: the picture and what it shows in words, for who cannot see it."""
    found: dict[str, tuple[str, str]] = {}
    numbered = [(i + 1, row) for i, row in enumerate(b.rows)]
    speed = [
        (i, size / 1e9, d.value, d.low, d.high)
        for i, r in numbered
        if (d := figures.decode(r)) and (size := figures.model_of(r, b).file_bytes)
    ]
    if speed:
        text = "; ".join(f"row {i}: {y:.1f} tokens/s at {x:.3f} GB" for i, x, y, *_ in speed)
        roof = b.host.read_bandwidth
        found["Speed against bytes"] = (_scatter(speed, "tokens/s, decode", roof), text)
    kept = []
    for i, r in numbered:
        size = figures.model_of(r, b).file_bytes
        if size and (q := r.quality):
            error = q.kld_error or 0
            kept.append((i, size / 1e9, q.kld_mean, q.kld_mean - error, q.kld_mean + error))
    if kept:
        text = "; ".join(f"row {i}: {y:.4f} nats at {x:.3f} GB" for i, x, y, *_ in kept)
        found["Quality against bytes (lower is better)"] = (_scatter(kept, "KL divergence, nats", None, True), text)
    series = [(i, r) for i, r in numbered if any(x.memory and len(x.memory.series) > 1 for x in figures.good_runs(r))]
    if series:
        found["Memory over time"] = (_memory(series), _peaks(series))
    between = {i: x for i, r in numbered if (x := figures.latencies(r))}
    timed = [(i, r) for i, r in numbered if i in between]
    if timed:
        text = "; ".join(f"row {i}: median {x[0]:.1f} ms, 99 % {x[2]:.1f} ms" for i, x in between.items())
        found["Time between tokens"] = (_latencies(timed), text)
    deep = [(i, r) for i, r in numbered if len(_by_depth(r)) > 1]
    if deep:
        text = "; ".join(f"row {i}: " + ", ".join(f"{y:.1f} after {x}" for x, y in _by_depth(r)) for i, r in deep)
        found["Decode by tokens in the cache"] = (_depths(deep), text)
    lasting = [(i, r) for i, r in numbered if any(x.sustained for x in figures.good_runs(r))]
    if lasting:
        found["Sustained decode"] = _sustained(lasting)
    return found


def loss_curve(loss: tuple[LossAt, ...], summary: Summary) -> str:
    """Training loss by step, with the held-out figures as lines."""
    figure = Figure(figsize=_SIZE)
    axes = _axes(figure, "step", "nats per token")
    axes.plot(
        [p.step for p in loss], [p.loss for p in loss], color=_COLOURS[1], linewidth=0.9, label="training batches"
    )
    for name, value, style, colour in (
        ("unigram model", summary.unigram_loss, ":", _COLOURS[0]),
        ("held-out, at the end", summary.final_loss, "--", _COLOURS[2]),
    ):
        if value is not None:
            axes.axhline(value, color=colour, linewidth=1.4, linestyle=style, label=f"{name}: {value:.2f}")
    axes.legend(frameon=False, labelcolor=_INK, fontsize=8)
    return _svg(figure, "loss")


def _scatter(
    points: list[tuple[int, float, float, float, float]], label: str, bandwidth: float | None, log: bool = False
) -> str:
    figure = Figure(figsize=_SIZE)
    axes = _axes(figure, "GB (1e9 bytes)", label)
    for i, x, y, low, high in points:
        colour, shape = _mark(i)
        axes.errorbar(x, y, [[max(0, y - low)], [max(0, high - y)]], fmt=shape, color=colour, markersize=6, capsize=2)
        axes.annotate(str(i), (x, y), (5, 4), textcoords="offset points", color=_INK, fontsize=8)
    xs = [p[1] for p in points]
    wide = (max(xs) - min(xs)) or max(xs)
    axes.set_xlim(max(0, min(xs) - 0.15 * wide), max(xs) + 0.2 * wide)
    if bandwidth:
        at = np.linspace(*axes.get_xlim(), 60)
        at = at[at > 0]
        top = 1.25 * max(p[4] for p in points)
        axes.plot(at, bandwidth / 1e9 / at, color=_INK, linewidth=1, linestyle="--", label="bandwidth / bytes")
        axes.set_ylim(0, max(top, min(1.6 * top, bandwidth / 1e9 / max(xs) * 1.1)))
        axes.legend(frameon=False, labelcolor=_INK, fontsize=8)
    if log and min(p[2] for p in points) > 0:
        axes.set_yscale("log")
    return _svg(figure, label)


def _memory(rows: list[tuple[int, Row]]) -> str:
    figure = Figure(figsize=_SIZE)
    axes = _axes(figure, "s", "resident, MB")
    for i, row in rows:
        run = next(x for x in figures.good_runs(row) if x.memory and len(x.memory.series) > 1)
        assert run.memory is not None
        xs, ys = [t / 1000 for t, _ in run.memory.series], [m / 1e6 for _, m in run.memory.series]
        _line(axes, i, xs, ys)
    axes.set_ylim(0)
    return _svg(figure, "memory")


def _peaks(rows: list[tuple[int, Row]]) -> str:
    return "; ".join(f"row {i}: peak {p.value / 1e6:.0f} MB" for i, r in rows if (p := figures.peak(r)))


def _latencies(rows: list[tuple[int, Row]]) -> str:
    """Share of tokens that came within so many milliseconds."""
    figure = Figure(figsize=_SIZE)
    axes = _axes(figure, "ms between tokens", "share of tokens")
    for i, row in rows:
        phases = [p for run in figures.good_runs(row) if (p := figures.at(run, None))]
        taken = sorted(t / 1e6 for p in phases for t in p.token_ns)
        if taken:
            _line(axes, i, taken, [(n + 1) / len(taken) for n in range(len(taken))])
    axes.set_xscale("log")
    axes.set_ylim(0, 1.02)
    return _svg(figure, "latencies")


def _by_depth(row: Row) -> list[tuple[int, float]]:
    found: dict[int, list[float]] = {}
    for run in figures.good_runs(row):
        for phase in run.phases:
            if rate := figures.decode_rate(phase):
                found.setdefault(figures.decode_depth(phase), []).append(rate)
    return sorted((depth, median(rates)) for depth, rates in found.items())


def _depths(rows: list[tuple[int, Row]]) -> str:
    figure = Figure(figsize=_SIZE)
    axes = _axes(figure, "tokens in the KV cache", "tokens/s, decode")
    for i, row in rows:
        _line(axes, i, [d for d, _ in _by_depth(row)], [r for _, r in _by_depth(row)], True)
    axes.set_ylim(0)
    return _svg(figure, "depths")


def _sustained(rows: list[tuple[int, Row]]) -> tuple[str, str]:
    figure = Figure(figsize=_SIZE)
    axes = _axes(figure, "s", "tokens/s")
    said = []
    for i, row in rows:
        windows = next(x.sustained for x in figures.good_runs(row) if x.sustained)
        ends = np.cumsum([w.seconds for w in windows]).tolist()
        rates = [w.tokens / w.seconds for w in windows]
        _line(axes, i, ends, rates, True)
        said.append(f"row {i}: {rates[0]:.1f} tokens/s at first, {rates[-1]:.1f} after {ends[-1]:.0f} s")
    axes.set_ylim(0)
    return _svg(figure, "sustained"), "; ".join(said)


def _mark(i: int) -> tuple[str, str]:
    return _COLOURS[(i - 1) % len(_COLOURS)], _SHAPES[(i - 1) % len(_SHAPES)]


def _line(axes: mpl.axes.Axes, i: int, xs: list[float], ys: list[float], marks: bool = False) -> None:
    """A row's line, its number at its end."""
    colour, shape = _mark(i)
    style = ("-", "--", "-.", ":")[(i - 1) // len(_COLOURS) % 4]
    axes.plot(xs, ys, color=colour, linewidth=1.3, linestyle=style, marker=shape if marks else None, markersize=5)
    axes.annotate(str(i), (xs[-1], ys[-1]), (3, 2), textcoords="offset points", color=_INK, fontsize=8)


def _axes(figure: Figure, x: str, y: str) -> mpl.axes.Axes:
    axes = figure.add_axes((0.15, 0.15, 0.82, 0.81))
    axes.set_xlabel(x, color=_INK, fontsize=9)
    axes.set_ylabel(y, color=_INK, fontsize=9)
    axes.tick_params(colors=_INK, labelsize=8, which="both")
    for name, side in axes.spines.items():
        side.set_visible(name in ("left", "bottom"))
        side.set_color(_INK)
    return axes


def _svg(figure: Figure, salt: str) -> str:
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")
