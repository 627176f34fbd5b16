"""A study as a page and a plot."""

import html
import os
from pathlib import Path

from phi_runtime.files import write_file
from phi_train.studies.result import StudyResult

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:1rem 0}"
    "td,th{border-bottom:1px solid #ddd;padding:.3rem .7rem;text-align:right}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}.yes{color:#17692f}.no{color:#a12622}"
)
_WORDS = {True: "shown", False: "not shown", None: "not judged"}


def write_report(r: StudyResult, out: Path, inside: str = "") -> None:
    """plot.png and index.html beside the result. inside: HTML of what the arms hold."""
    plot(r, out / "plot.png")
    write_file(out / "index.html", page(f"Study: {r.name}", _section(r, "plot.png") + inside))


def write_overview(results: list[StudyResult], out: Path) -> None:
    """index.html over studies whose folders lie in `out`."""
    rows = "".join(
        f"<tr><td><a href='#{r.name}'>{r.name}</a></td><td>{len(r.arms)}</td><td>{r.seconds:.0f}</td>"
        f"<td class='{_class(r.shown)}'>{_WORDS[r.shown]}</td></tr>"
        for r in results
    )
    table = f"<table><tr><th>study</th><th>trainings</th><th>seconds of training</th><th></th></tr>{rows}</table>"
    sections = "".join(f"<h2 id='{r.name}'>{r.name}</h2>{_section(r, f'{r.name}/plot.png')}" for r in results)
    write_file(out / "index.html", page("Studies", table + sections))


def page(title: str, body: str) -> str:
    """A whole page."""
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1>{body}</html>\n"
    )


def _class(shown: bool | None) -> str:
    return {True: "yes", False: "no", None: ""}[shown]


def _section(r: StudyResult, picture: str) -> str:
    names = list(dict.fromkeys(a.arm for a in r.arms))
    metrics = list(r.arms[0].metrics)
    head = "".join(f"<th>{html.escape(m)}</th>" for m in metrics)
    rows = []
    for name in names:
        own = [a for a in r.arms if a.arm == name]
        cells = "".join(f"<td>{_range([a.metrics[m] for a in own])}</td>" for m in metrics)
        first, seconds = own[0], sum(a.seconds for a in own) / len(own)
        rows.append(
            f"<tr><td>{html.escape(name)}</td><td>{first.block_parameters:,}</td><td>{first.steps:,}</td>"
            f"<td>{first.tokens:,}</td><td>{seconds:.0f}</td>{cells}</tr>"
        )
    compared = "".join(
        f"<tr><td>{html.escape(c.metric)}: {html.escape(c.more)} over {html.escape(c.less)}"
        f"{'' if c.of_claim else ' (beside the claim)'}</td><td>{c.effect:+.3f}</td><td>{c.spread:.3f}</td>"
        f"<td class='{_class(c.shown)}'>{_WORDS[c.shown]}</td></tr>"
        for c in r.comparisons
    )
    return (
        f"<p>{html.escape(r.paragraph)}</p><img src='{picture}' alt='{html.escape(r.name)}: metrics of each arm'>"
        f"<table><tr><th>arm</th><th>block parameters</th><th>steps</th><th>tokens</th><th>seconds</th>{head}</tr>"
        f"{''.join(rows)}</table><table><tr><th>comparison</th><th>effect</th><th>spread</th><th></th></tr>{compared}"
        f"</table><p>Scale {r.scale}, seeds {', '.join(map(str, r.seeds))}, phi-edge {r.version}. Metrics: mean over "
        "seeds, lowest and highest.</p>"
    )


def _range(values: list[float]) -> str:
    mean = sum(values) / len(values)
    return f"{mean:.3f}" if len(values) == 1 else f"{mean:.3f} ({min(values):.3f} to {max(values):.3f})"


def plot(r: StudyResult, out: Path) -> None:
    """Each metric's values by arm, a dot a seed."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(a.arm for a in r.arms))
    metrics = list(r.arms[0].metrics)
    figure = Figure(figsize=(1.2 + 2.8 * len(metrics), 1.6 + 0.32 * len(names)), layout="constrained")
    panels = figure.subplots(1, len(metrics), sharey=True, squeeze=False)[0]
    for axes, metric in zip(panels, metrics, strict=True):
        for at, name in enumerate(names):
            values = [a.metrics[metric] for a in r.arms if a.arm == name]
            axes.plot(values, [at] * len(values), "o", color="C0", alpha=0.5)
            axes.plot([sum(values) / len(values)], [at], "|", color="black", markersize=14)
        axes.set_title(metric, fontsize=10)
        axes.grid(axis="x", linewidth=0.4)
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
    beside = out.with_name(f".{out.name}.new")
    figure.savefig(beside, dpi=120, format="png")
    os.replace(beside, out)
