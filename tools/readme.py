"""Put the demo's figures into the README: `python tools/readme.py out/demo/report.json`.

Keeps the result as docs/demo.json, draws docs/demo.svg from it and rewrites the table between the
README's markers. With no argument, redoes the last two from docs/demo.json.
"""

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from phi_bench import figures
from phi_bench.records import Benchmark, read_benchmark
from phi_bench.results.tables import cells, heading, mb

ROOT = Path(__file__).resolve().parent.parent
KEPT, PICTURE, README = ROOT / "docs" / "demo.json", ROOT / "docs" / "demo.svg", ROOT / "README.md"
BEGIN, END = "<!-- figures: tools/readme.py -->", "<!-- end of figures -->"
SHOWN = ("size", "bits", "decode", "prefill", "ttft", "warm", "peak", "perplexity", "kld", "top1")
_COLOURS = {"checkpoint": "#8a8f98", "gguf": "#d9822b", "onnx": "#3b82c4", "coreml": "#3f9d6b"}
_GREY = "#80868f"  # readable on white and on black alike


def main() -> None:
    """Update whatever follows from the result."""
    if len(sys.argv) > 1:
        KEPT.write_text(Path(sys.argv[1]).read_text())
    b = load(KEPT)
    PICTURE.write_text(picture(b))
    before, rest = README.read_text().split(BEGIN)
    README.write_text(before + BEGIN + "\n" + table(b) + END + rest.split(END)[1])


def load(path: Path) -> Benchmark:
    """A result of `phi-bench run`."""
    return read_benchmark(path)


def table(b: Benchmark) -> str:
    """The README's paragraph and table."""
    c, s = b.checkpoint, b.settings
    assert c is not None
    t = c.training
    assert t is not None
    assert c.perplexity is not None
    rows = [["format", "engine", *(heading(k) for k in SHOWN)], ["---", "---", *["---:"] * len(SHOWN)]]
    own = {"size": mb(c.file_bytes), "bits": f"{c.bits_per_weight:.2f}", "perplexity": f"{c.perplexity:.3f}"}
    rows.append(["checkpoint", "reference", *(own.get(k, "") for k in SHOWN)])
    for row in b.rows:
        found = cells(row, b)
        rows.append([figures.model_of(row, b).format, row.configuration.engine, *(found[k].text for k in SHOWN)])
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        f"\nOn {b.host.cores} cores of an {b.host.cpu}: {t.parameters:,} parameters, {t.tokens:,} tokens in "
        f"{t.seconds:.0f} s; held-out loss {t.initial_loss:.3f} before, {t.final_loss:.3f} after, "
        f"{t.unigram_loss:.3f} for a unigram model. Quality over {s.quality_tokens:,} held-out tokens; speed is "
        f"the median of {s.rounds} rounds.\n\n{lines}\n\n![bytes and quality of each bundle](docs/demo.svg)\n\n"
    )


def picture(b: Benchmark) -> str:
    """Bytes and quality, side by side."""
    c = b.checkpoint
    assert c is not None
    drawing = Figure(figsize=(8.4, 1.9))
    named = {figures.model_of(row, b).format: row for row in b.rows}
    sizes = {"checkpoint": c.file_bytes / 1e6}
    sizes |= {name: (figures.model_of(row, b).file_bytes or 0) / 1e6 for name, row in named.items()}
    losses = {name: 1000 * row.quality.kld_mean for name, row in named.items() if row.quality}
    for place, title, values in (
        (0, "bytes on disk, MB", sizes),
        (1, "KL divergence, thousandths of a nat", losses),
    ):
        axes = drawing.add_axes((0.1 + 0.5 * place, 0.02, 0.38, 0.8))
        drawn = axes.barh(list(values), list(values.values()), color=[_COLOURS[k] for k in values], height=0.62)
        axes.bar_label(drawn, [f"{v:.2f}" for v in values.values()], padding=4, color=_GREY, fontsize=9)
        axes.set_title(title, color=_GREY, fontsize=9, loc="left")
        axes.set_xlim(0, max(values.values()) * 1.2)
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.tick_params(axis="y", colors=_GREY, length=0, labelsize=9)
        axes.set_frame_on(False)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "demo", "font.family": "sans-serif"}):
        drawing.savefig(PICTURE, format="svg", transparent=True, metadata={"Date": None})
    return PICTURE.read_text()


if __name__ == "__main__":
    main()
