"""The report's pictures: inline SVG that takes its text colour from the page, light or dark."""

import io

import matplotlib as mpl
from matplotlib.figure import Figure

from phi_bench.report import LossAt, Report
from phi_train.trainer.summary import Summary

# Matplotlib wants a colour; this one is replaced by the page's own.
_INK = "#010203"
COLOURS = {"checkpoint": "#8a8f98", "gguf": "#d9822b", "onnx": "#3b82c4", "coreml": "#3f9d6b"}


def bars(labels: list[str], values: list[float], unit: str, digits: int) -> str:
    """Horizontal bars with their figures at the end."""
    figure = Figure(figsize=(4.6, 0.42 * len(labels) + 0.2))
    left = 0.22 if max(map(len, labels)) < 12 else 0.45
    axes = figure.add_axes((left, 0.02, 0.98 - left, 0.96))
    drawn = axes.barh(labels, values, color=[COLOURS.get(x.split()[0], _INK) for x in labels], height=0.62)
    axes.bar_label(drawn, [f"{v:,.{digits}f} {unit}" for v in values], padding=4, color=_INK, fontsize=9)
    axes.set_xlim(0, max(values) * 1.42)
    axes.invert_yaxis()
    axes.set_xticks([])
    axes.tick_params(axis="y", colors=_INK, length=0, labelsize=9)
    for side in axes.spines.values():
        side.set_visible(False)
    return _svg(figure, f"{unit}{labels}{digits}")


def loss_curve(loss: tuple[LossAt, ...], summary: Summary) -> str:
    """Training loss by step, with the held-out figures as lines."""
    figure = Figure(figsize=(4.6, 2.6))
    axes = figure.add_axes((0.12, 0.17, 0.86, 0.79))
    steps, values = [p.step for p in loss], [p.loss for p in loss]
    axes.plot(steps, values, color=COLOURS["onnx"], linewidth=0.9, label="training batches")
    for name, value, colour in (
        ("unigram model", summary.unigram_loss, COLOURS["gguf"]),
        ("held-out, at the end", summary.final_loss, COLOURS["coreml"]),
    ):
        if value is not None:
            axes.axhline(value, color=colour, linewidth=1.4, linestyle="--", label=f"{name}: {value:.2f}")
    axes.set_xlabel("step", color=_INK, fontsize=9)
    axes.set_ylabel("nats per token", color=_INK, fontsize=9)
    axes.tick_params(colors=_INK, labelsize=8)
    for name, side in axes.spines.items():
        side.set_visible(name in ("left", "bottom"))
        side.set_color(_INK)
    axes.legend(frameon=False, labelcolor=_INK, fontsize=8)
    return _svg(figure, "loss")


def all_bars(report: Report) -> dict[str, str]:
    """Each figure by its heading."""
    results = report.results
    formats = [r.format for r in results]
    alone = len(set(formats)) == len(formats)
    labels = [r.format if alone else f"{r.format} {r.name}, {r.backend}" for r in results]
    c = report.checkpoint
    sizes = [r.file_bytes / 1e6 for r in results]
    pictures = {
        "Bytes on disk": bars(
            ["checkpoint"] * bool(c) + labels, [c.file_bytes / 1e6] * bool(c) + sizes if c else sizes, "MB", 2
        ),
        "Peak memory (RSS)": bars(labels, [r.peak_rss_bytes / 1e6 for r in results], "MB", 0),
        "Generation": bars(labels, [r.decode_tps for r in results], "tokens/s", 0),
        "Reading a prompt": bars(labels, [r.prompt_tps for r in results], "tokens/s", 0),
    }
    if c and c.perplexity is not None:
        pictures["Perplexity, held-out text"] = bars(
            ["checkpoint", *labels], [c.perplexity, *(r.perplexity or 0 for r in results)], "", 2
        )
        pictures["KL divergence from the checkpoint"] = bars(labels, [r.kld_mean or 0 for r in results], "nats", 4)
    return pictures


def _svg(figure: Figure, salt: str) -> str:
    out = io.StringIO()
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": salt, "font.family": "sans-serif"}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None})
    svg = out.getvalue()
    return svg[svg.index("<svg") :].replace(_INK, "currentColor")
