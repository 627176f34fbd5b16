"""Put the demo's figures into the README: `python tools/readme.py out/demo/report.json`.

Keeps the report as docs/demo.json, draws docs/demo.svg from it and rewrites the table between the
README's markers. With no argument, redoes the last two from docs/demo.json.
"""

import sys
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from phi_bench.page import COLUMNS, cells, mb
from phi_bench.plots import COLOURS
from phi_bench.report import Report
from phi_runtime.contract import decode

ROOT = Path(__file__).resolve().parent.parent
KEPT, PICTURE, README = ROOT / "docs" / "demo.json", ROOT / "docs" / "demo.svg", ROOT / "README.md"
BEGIN, END = "<!-- figures: tools/readme.py -->", "<!-- end of figures -->"
_GREY = "#80868f"  # readable on white and on black alike


def main() -> None:
    """Update whatever follows from the report."""
    if len(sys.argv) > 1:
        KEPT.write_text(Path(sys.argv[1]).read_text())
    report = load(KEPT)
    PICTURE.write_text(picture(report))
    before, rest = README.read_text().split(BEGIN)
    README.write_text(before + BEGIN + "\n" + figures(report) + END + rest.split(END)[1])


def load(path: Path) -> Report:
    """A report from its JSON."""
    return decode(path.read_bytes(), Report)


def figures(report: Report) -> str:
    """The README's paragraph and table."""
    c, m, s = report.checkpoint, report.machine, report.settings
    assert c is not None
    t = c.training
    assert t is not None
    rows = [COLUMNS, ("---", "---", *["---:"] * (len(COLUMNS) - 2))]
    rows.append(("checkpoint", "reference", mb(c.file_bytes), f"{c.bits_per_weight:.2f}", *[""] * 5))
    rows[-1] += (f"{c.perplexity:.3f}", "", "")
    rows += [tuple(cells(r)) for r in report.results]
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return (
        f"\nOn {m.cores} cores of an {m.cpu}: {t.parameters:,} parameters, {t.tokens:,} tokens in "
        f"{t.seconds:.0f} s; held-out loss {t.initial_loss:.3f} before, {t.final_loss:.3f} after, "
        f"{t.unigram_loss:.3f} for a unigram model. Quality over {s.quality_tokens:,} held-out tokens; speed is "
        f"the median of {s.rounds} rounds.\n\n{table}\n\n![bytes and quality of each bundle](docs/demo.svg)\n\n"
    )


def picture(report: Report) -> str:
    """Bytes and tokens per second, side by side."""
    c = report.checkpoint
    assert c is not None
    figure = Figure(figsize=(8.4, 1.9))
    sizes = {"checkpoint": c.file_bytes / 1e6} | {r.format: r.file_bytes / 1e6 for r in report.results}
    losses = {r.format: 1000 * (r.kld_mean or 0) for r in report.results}
    for place, title, values, unit in (
        (0, "bytes on disk, MB", sizes, "{:.2f}"),
        (1, "KL divergence, thousandths of a nat", losses, "{:.2f}"),
    ):
        axes = figure.add_axes((0.1 + 0.5 * place, 0.02, 0.38, 0.8))
        drawn = axes.barh(list(values), list(values.values()), color=[COLOURS[k] for k in values], height=0.62)
        axes.bar_label(drawn, [unit.format(v) for v in values.values()], padding=4, color=_GREY, fontsize=9)
        axes.set_title(title, color=_GREY, fontsize=9, loc="left")
        axes.set_xlim(0, max(values.values()) * 1.2)
        axes.invert_yaxis()
        axes.set_xticks([])
        axes.tick_params(axis="y", colors=_GREY, length=0, labelsize=9)
        axes.set_frame_on(False)
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "demo", "font.family": "sans-serif"}):
        figure.savefig(PICTURE, format="svg", transparent=True, metadata={"Date": None})
    return PICTURE.read_text()


if __name__ == "__main__":
    main()
