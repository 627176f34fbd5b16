"""How many documents each step of a pipeline let through, and some of them to look at."""

from html import escape

import msgspec

from phi_runtime.contract import Contract

SAMPLES = 3  # of each kind, a shard and in the report
_SHOWN = 300  # characters


class Sample(Contract, frozen=True):
    """The beginning of a document. why: it was dropped, nothing for one that was kept."""

    id: str
    text: str
    why: str = ""


class StepCount(msgspec.Struct):
    """Of one step: documents and characters that it was given and let through; dropped ones by reason."""

    name: str
    documents: int = 0
    characters: int = 0
    kept: int = 0
    kept_characters: int = 0
    changed: int = 0
    seconds: float = 0.0
    reasons: dict[str, int] = {}
    dropped: list[Sample] = []
    passed: list[Sample] = []

    def add(self, id: str, text: str, after: str | None, why: str, seconds: float) -> None:
        """A document; `after` is None where it was dropped."""
        self.documents += 1
        self.characters += len(text)
        self.seconds += seconds
        if after is None:
            self.reasons[why] = self.reasons.get(why, 0) + 1
            if len(self.dropped) < SAMPLES:
                self.dropped.append(Sample(id, text[:_SHOWN], why))
            return
        self.kept += 1
        self.kept_characters += len(after)
        self.changed += after is not text and after != text
        if len(self.passed) < SAMPLES:
            self.passed.append(Sample(id, after[:_SHOWN]))

    def merge(self, other: "StepCount") -> None:
        """Another shard's."""
        for name in ("documents", "characters", "kept", "kept_characters", "changed", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for why, count in other.reasons.items():
            self.reasons[why] = self.reasons.get(why, 0) + count
        self.dropped = [*self.dropped, *other.dropped][:SAMPLES]
        self.passed = [*self.passed, *other.passed][:SAMPLES]


class Funnel(Contract, frozen=True):
    """A whole run; a step's seconds are summed over processes, and what a run before a kill took counts too."""

    fingerprint: str
    files: int
    shards: int
    read: int
    unreadable: dict[str, int]
    unreadable_first: list[str]
    steps: list[StepCount]
    documents: int
    tokens: int
    heldout_tokens: int


def page(f: Funnel) -> str:
    """The report as HTML."""
    rows, samples = [], []
    for s in f.steps:
        share = s.kept / f.read if f.read else 0.0
        reasons = ", ".join(f"{escape(why)} {n:,}" for why, n in sorted(s.reasons.items(), key=lambda r: -r[1])[:8])
        rows.append(
            f"<tr><th>{escape(s.name)}</th><td>{s.documents:,}</td><td>{s.kept:,}</td><td>{s.changed:,}</td>"
            f"<td>{s.kept_characters / 1e6:,.1f}</td><td>{s.seconds:,.1f}</td>"
            f'<td class=bar><i style="width:{100 * share:.1f}%"></i>{100 * share:.1f} %</td><td>{reasons}</td></tr>'
        )
        for title, some in (("dropped", s.dropped), ("kept", s.passed)):
            for one in some:
                why = f" ({escape(one.why)})" if one.why else ""
                samples.append(f"<h3>{escape(s.name)}: {title}{why}: <code>{escape(one.id)}</code></h3>")
                samples.append(f"<pre>{escape(one.text)}</pre>")
    unread = "".join(f"<li>{n:,} {escape(why)}</li>" for why, n in f.unreadable.items())
    return _PAGE.format(
        read=f"{f.read:,}",
        files=f"{f.files:,}",
        documents=f"{f.documents:,}",
        tokens=f"{f.tokens + f.heldout_tokens:,} tokens, {f.heldout_tokens:,} of them held out"
        if f.tokens
        else "no tokens",
        unread=f"<p>Records that were not read:</p><ul>{unread}</ul>" if unread else "",
        rows="\n".join(rows),
        samples="\n".join(samples),
    )


_PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>Curation</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #ddd; vertical-align: top }}
th:first-child, td:last-child {{ text-align: left }}
.bar {{ position: relative; min-width: 9rem; text-align: left; background: #f4f4f4 }}
.bar i {{ position: absolute; inset: 0 auto 0 0; background: #bcd7f0; z-index: -1 }}
.bar {{ isolation: isolate }}
pre {{ background: #f6f6f6; padding: .6rem; overflow: auto; white-space: pre-wrap }}
h3 {{ font-size: 1rem; margin-bottom: .2rem }}
</style>
<h1>Curation</h1>
<p>{read} documents of {files} files; {documents} kept; {tokens}.</p>
{unread}
<table><tr><th>step</th><th>given</th><th>kept</th><th>changed</th><th>M characters</th><th>seconds</th>
<th>of all read</th><th>dropped because</th></tr>
{rows}
</table>
<h2>Samples</h2>
{samples}
</html>
"""
