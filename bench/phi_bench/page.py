"""The report as one HTML file: no scripts, nothing fetched, light and dark, phone and desktop."""

from html import escape

from phi_bench.plots import all_bars, loss_curve
from phi_bench.report import Report, Result

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #5d6675; --line: #d8dce3; --page: #ffffff; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaef; --soft: #a2a9b6; --line: #343a46; --page: #14171d; --card: #1d222b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 74rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; }
p { max-width: 46rem; } .soft { color: var(--soft); }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem; min-width: 0; }
.card svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86rem; width: 100%; }
th, td { text-align: right; padding: .35rem .5rem; border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
td { white-space: nowrap; }
th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
pre { margin: 0; font: .78rem/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre b { color: var(--soft); font-weight: 400; }
"""


# The columns of the table, in words; `cells` gives their values.
COLUMNS = (
    "format",
    "backend",
    "size",
    "bits/weight",
    "load",
    "first token",
    "prompt, tokens/s",
    "generation, tokens/s",
    "peak memory",
    "perplexity",
    "KL divergence",
    "same top token",
)


def render(report: Report) -> str:
    """The page."""
    c = report.checkpoint
    name = c.name if c else "bundles"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>phi-edge: {escape(name)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(name)}, in 4 bits</h1>",
        f'<p class="soft">{escape(_machine(report))}</p>',
        _learned(report),
        _random(report),
        "<h2>Measured</h2>",
        _table(report),
        '<div class="grid" style="margin-top:1rem">',
    ]
    parts += [f'<div class="card"><h3>{escape(h)}</h3>{svg}</div>' for h, svg in all_bars(report).items()]
    if c and c.loss and c.training:
        parts.append(f'<div class="card"><h3>Training loss</h3>{loss_curve(c.loss, c.training)}</div>')
    parts += ["</div>", _notes(report), "<h2>What each writes</h2>", _samples(report), "</body></html>"]
    return "\n".join(parts) + "\n"


def _machine(report: Report) -> str:
    m = report.machine
    return (
        f"{m.cpu}, {m.cores} cores, {m.memory_bytes / 1e9:.1f} GB ({m.memory_bytes / 2**30:.1f} GiB) of memory, "
        f"{m.system}, Python {m.python}, phi-edge {m.phi_edge}"
    )


def _learned(report: Report) -> str:
    t = report.checkpoint.training if report.checkpoint else None
    if not t:
        return ""
    unigram = "" if t.unigram_loss is None else f"; a unigram model of the same tokens has {t.unigram_loss:.3f}"
    return (
        f"<p>{t.parameters:,} parameters, trained on {t.tokens:,} tokens in {t.seconds:.0f} s "
        f"({t.tokens_per_second:,.0f} tokens/s). Held-out loss {t.initial_loss:.3f} at the start, "
        f"<strong>{t.final_loss:.3f}</strong> at the end{unigram} (nats per token).</p>"
    )


def _random(report: Report) -> str:
    if not report.settings.random_weights:
        return ""
    return "<p><strong>The weights are random.</strong> Bytes, memory and speed are real; quality means nothing.</p>"


def _table(report: Report) -> str:
    rows = [f"<tr>{''.join(f'<th>{escape(h)}</th>' for h in COLUMNS)}</tr>"]
    if c := report.checkpoint:
        baseline = ["checkpoint", "reference", mb(c.file_bytes), f"{c.bits_per_weight:.2f}", *[""] * 5]
        rows.append(_row([*baseline, _figure(c.perplexity, 3), "", ""]))
    rows += [_row(cells(r)) for r in report.results]
    return f'<div class="scroll"><table>{"".join(rows)}</table></div>'


def cells(r: Result) -> list[str]:
    """A result as the cells of a table."""
    return [
        r.format,
        r.backend,
        mb(r.file_bytes),
        f"{r.bits_per_weight:.2f}",
        f"{1000 * r.load_s:.0f} ms",
        f"{1000 * r.ttft_s:.0f} ms",
        f"{r.prompt_tps:,.0f}",
        f"{r.decode_tps:,.0f}",
        mb(r.peak_rss_bytes),
        _figure(r.perplexity, 3),
        _figure(r.kld_mean, 4),
        "" if r.top1_agreement is None else f"{100 * r.top1_agreement:.1f} %",
    ]


def mb(count: int) -> str:
    """Bytes in MB (1e6), or in GB (1e9) and GiB (2**30) from one on."""
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB ({count / 2**30:.2f} GiB)"


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _row(values: list[str]) -> str:
    return f"<tr>{''.join(f'<td>{escape(v)}</td>' for v in values)}</tr>"


def _notes(report: Report) -> str:
    s = report.settings
    quality = (
        f" Quality: the first {s.quality_tokens:,} tokens of the text, read in windows from an empty context, "
        "against the checkpoint's weights in float32 arithmetic."
        if s.quality_tokens
        else ""
    )
    reference = (
        " mil-reference interprets the Core ML package in NumPy, to check it; it says nothing of the speed on a phone."
        if any(r.backend == "mil-reference" for r in report.results)
        else ""
    )
    first = report.results[0]
    return (
        f'<p class="soft">Speed: medians of {s.rounds} rounds in turn, each in a fresh process; a prompt of '
        f"{first.prompt_tokens} tokens, then {first.decode_tokens} generated. Peak memory is the whole process, "
        f"Python and libraries included.{quality}{reference}</p>"
    )


def _samples(report: Report) -> str:
    parts = []
    for i, prompt in enumerate(report.settings.prompts):
        parts.append('<div class="grid" style="margin-bottom:1rem">')
        for r in report.results:
            text = f"<pre><b>{escape(prompt)}</b>{escape(r.samples[i])}</pre>"
            parts.append(f'<div class="card"><h3>{escape(r.format)}</h3>{text}</div>')
        parts.append("</div>")
    return "".join(parts)
