"""The report as one HTML file: nothing fetched, light and dark, print and phone, keyboard and screen reader."""

from html import escape

from phi_bench import figures
from phi_bench.records import Benchmark
from phi_bench.results.plots import all_plots, loss_curve
from phi_bench.results.tables import cells, failure_of, heading, machine_line, mb, method_line, used

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2330; --soft: #565f6e; --line: #d8dce3; --page: #ffffff; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8eaef; --soft: #a9b0bc; --line: #343a46; --page: #14171d; --card: #1d222b; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 80rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; }
p { max-width: 46rem; } .soft { color: var(--soft); }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; padding: .9rem; min-width: 0;
  break-inside: avoid; }
.card svg { width: 100%; height: auto; display: block; }
.scroll { overflow-x: auto; }
.scroll:focus-visible, button:focus-visible { outline: 2px solid currentColor; outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .86rem; }
th, td { text-align: right; padding: .35rem .5rem; border-bottom: 1px solid var(--line); vertical-align: top; }
th[scope=row], th:nth-child(2) { text-align: left; }
td { white-space: nowrap; } td small { display: block; color: var(--soft); }
td.words { white-space: normal; min-width: 16rem; text-align: left; }
thead th { font-weight: 600; color: var(--soft); vertical-align: bottom; }
tbody th { font-weight: 600; min-width: 9rem; }
@media (min-width: 44rem) { th[scope=row] { position: sticky; left: 0; background: var(--page); } }
th button { all: unset; cursor: pointer; } th button::after { content: " \\2195"; opacity: .5; }
th[aria-sort=ascending] button::after { content: " \\2191"; opacity: 1; }
th[aria-sort=descending] button::after { content: " \\2193"; opacity: 1; }
pre { margin: 0; font: .78rem/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre b { color: var(--soft); font-weight: 400; }
@media print { .scroll { overflow: visible; } table { font-size: .62rem; } th button::after { content: ""; }
  body { max-width: none; padding: 0; } }
"""
# Sorts by the cells' data-n, the empty ones last; aria-sort tells a screen reader.
_SCRIPT = """
document.querySelectorAll("thead button").forEach((button) => button.addEventListener("click", () => {
  const head = button.closest("th"), at = head.cellIndex, body = head.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") === "ascending";
  head.parentNode.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  const value = (row) => row.cells[at].dataset.n, text = (row) => row.cells[at].textContent;
  [...body.rows].sort((a, b) => {
    const x = value(a), y = value(b);
    if (x === undefined || y === undefined)
      return (x === undefined) - (y === undefined) || text(a).localeCompare(text(b));
    return down ? y - x : x - y;
  }).forEach((row) => body.append(row));
}));
"""


def render(b: Benchmark) -> str:
    """The page."""
    name = b.checkpoint.name if b.checkpoint else "Benchmark"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>phi-edge: {escape(name)}</title><style>{_STYLE}</style></head><body><main>",
        f"<h1>{escape(name)}: bytes, memory, speed and quality</h1>",
        f'<p class="soft">{escape(machine_line(b))}</p>',
        "" if b.complete else "<p><strong>Incomplete:</strong> the run was interrupted; the same command goes on.</p>",
        _learned(b),
        _random(b),
        '<h2 id="measured">Measured</h2>',
        _table(b),
        f'<p class="soft">{escape(method_line(b))}{_reference(b)}</p>',
        "<h2>Pictures</h2>",
        '<p class="soft">Rows are numbered as they stand in the table before it is sorted.</p>',
        '<div class="grid">',
    ]
    pictures = all_plots(b)
    if (c := b.checkpoint) and c.loss and c.training:
        words = f"from {c.loss[0].loss:.2f} to {c.loss[-1].loss:.2f} nats per token in {c.loss[-1].step} steps"
        pictures["Training loss"] = (loss_curve(c.loss, c.training), words)
    for title, (svg, words) in pictures.items():
        picture = svg.replace("<svg ", f'<svg role="img" aria-label="{escape(title)}: {escape(words)}" ', 1)
        parts.append(f'<figure class="card" style="margin:0"><h3>{escape(title)}</h3>{picture}</figure>')
    parts += ["</div>", _samples(b), _software(b), f"</main><script>{_SCRIPT}</script></body></html>"]
    return "\n".join(parts) + "\n"


def _learned(b: Benchmark) -> str:
    t = b.checkpoint.training if b.checkpoint else None
    if not t:
        return ""
    unigram = "" if t.unigram_loss is None else f"; a unigram model of the same tokens has {t.unigram_loss:.3f}"
    return (
        f"<p>{t.parameters:,} parameters, trained on {t.tokens:,} tokens in {t.seconds:.0f} s "
        f"({t.tokens_per_second:,.0f} tokens/s). Held-out loss {t.initial_loss:.3f} at the start, "
        f"<strong>{t.final_loss:.3f}</strong> at the end{unigram} (nats per token).</p>"
    )


def _random(b: Benchmark) -> str:
    if not any(m.random_weights for m in b.models):
        return ""
    return "<p><strong>The weights are random.</strong> Bytes, memory and speed are real; quality means nothing.</p>"


def _table(b: Benchmark) -> str:
    shown = used(b)
    heads = "".join(f'<th scope="col"><button type="button">{escape(heading(k))}</button></th>' for k in shown)
    rows = []
    if c := b.checkpoint:
        rows.append(_checkpoint_row(b, shown, c.name))
    for i, row in enumerate(b.rows, 1):
        found = cells(row, b)
        line = [f'<td data-n="{i}">{i}</td>', f'<th scope="row">{escape(row.name)}</th>']
        if (failed := failure_of(row)) and not figures.good_runs(row):
            rows.append(f'<tr>{"".join(line)}<td class="words" colspan="{len(shown) - 1}">{escape(failed)}</td></tr>')
            continue
        for key in shown[1:]:
            cell = found[key]
            number = "" if cell.number is None else f' data-n="{cell.number:.9g}"'
            note = f"<small>{escape(cell.note)}</small>" if cell.note else ""
            words = ' class="words"' if key == "notes" else ""
            line.append(f"<td{number}{words}>{escape(cell.text)}{note}</td>")
        rows.append(f"<tr>{''.join(line)}</tr>")
    head = f'<thead><tr><th scope="col"><button type="button">row</button></th>{heads}</tr></thead>'
    return (
        '<div class="scroll" tabindex="0" role="region" aria-labelledby="measured">'
        f"<table>{head}<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _checkpoint_row(b: Benchmark, shown: list[str], name: str) -> str:
    c = b.checkpoint
    assert c is not None
    known = {
        "size": (mb(c.file_bytes), float(c.file_bytes)),
        "bits": (f"{c.bits_per_weight:.2f}", c.bits_per_weight),
        "perplexity": ("" if c.perplexity is None else f"{c.perplexity:.3f}", c.perplexity),
    }
    line = ['<td data-n="0"></td>', f'<th scope="row">{escape(name)}, the checkpoint</th>']
    for key in shown[1:]:
        text, number = known.get(key, ("", None))
        sort = "" if number is None else f' data-n="{number:.9g}"'
        line.append(f"<td{sort}>{text}</td>")
    return f"<tr>{''.join(line)}</tr>"


def _reference(b: Benchmark) -> str:
    if not any(r.configuration.engine == "mil-reference" for r in b.rows):
        return ""
    return " mil-reference interprets the Core ML package in NumPy, to check it; it says nothing of a phone's speed."


def _samples(b: Benchmark) -> str:
    rows = [r for r in b.rows if len(r.samples) == len(b.settings.prompts) > 0]
    if not rows:
        return ""
    parts = ["<h2>What each writes</h2>"]
    for i, prompt in enumerate(b.settings.prompts):
        parts.append('<div class="grid" style="margin-bottom:1rem">')
        for r in rows:
            text = f"<pre><b>{escape(prompt)}</b>{escape(r.samples[i])}</pre>"
            parts.append(f'<div class="card"><h3>{escape(r.name)}</h3>{text}</div>')
        parts.append("</div>")
    return "".join(parts)


def _software(b: Benchmark) -> str:
    said = sorted({f"{name} {version}" for r in b.rows for name, version in r.configuration.versions.items()})
    how = {r.configuration.adapter: r.configuration.command for r in b.rows if r.configuration.command}
    parts = [f"<li>{escape(a)}: {escape(command)}</li>" for a, command in how.items()]
    files = {figures.model_of(r, b).name: figures.model_of(r, b).sha256 for r in b.rows}
    digests = [f"<li>{escape(name)}: sha256 {escape(digest) or 'not known'}</li>" for name, digest in files.items()]
    parts += [f"<li>{escape(r.name)}: {escape(r.build)}</li>" for r in b.rows if r.build]
    revision = f"; revision {escape(b.software.revision)}" if b.software.revision else ""
    return (
        f'<h2>What ran</h2><p class="soft">{escape(", ".join(said))}{revision}</p>'
        f'<ul class="soft" style="overflow-wrap:anywhere">{"".join(parts + digests)}</ul>'
    )
