"""What `phi-export` prints: progress to the terminal's error stream, tables to its output."""

import math
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from phi_export.allocate import QuantizationPlan, gb
from phi_export.calibrate.calibration import Calibration
from phi_export.calibrate.equalise import FILE
from phi_export.defaults import BUILT_IN, PREFERENCES
from phi_export.formats import get_format
from phi_export.formats.coreml.lint import Finding
from phi_export.pipeline import Exported
from phi_export.pipeline import Progress as ExportProgress
from phi_export.verify.gate import NOTED
from phi_export.verify.verification import Verification
from phi_runtime.architecture.checkpoint import Checkpoint
from phi_runtime.backends import DEFAULT_CONTEXT
from phi_runtime.package.manifest import HeldOut
from phi_runtime.planning.speed import load_speeds

_LOG_EVERY = 30  # seconds
_out = Console(highlight=False)
_err = Console(stderr=True, highlight=False)


def note(text: str) -> None:
    """A line beside the progress."""
    _err.print(text, markup=False, soft_wrap=True)


def notes(checkpoint: Checkpoint) -> None:
    """What was read otherwise than it is spelt."""
    for said in checkpoint.notes:
        note(said)


def size_report(checkpoint: Checkpoint, planned: QuantizationPlan, calibration: Calibration | None = None) -> None:
    """The table of `--dry-run`: what each group of tensors will take and cost, and what follows from it."""
    plan = planned.plan
    total, weights = planned.weight_bytes, sum(q.weights for q in plan.values())
    profile = f" ({planned.options.profile})" if planned.options.profile else ""
    table = Table(title=f"{planned.format}{profile}: {weights:,} weights", title_justify="left")
    costs = ["expected loss"] if calibration else []
    for column in ("tensors", "type", "bits/weight", "bytes", "share", *costs):
        table.add_column(column, justify="left" if column in ("tensors", "type") else "right")
    groups: dict[tuple[str, str], list[str]] = {}
    for name, quant in plan.items():
        groups.setdefault((_short(name), quant.type), []).append(name)
    for (group, kind), names in groups.items():
        size, count = sum(plan[n].bytes for n in names), sum(plan[n].weights for n in names)
        label = group if len(names) == 1 else f"{len(names)} x {group}"
        lost = [f"{sum(planned.losses.get(n, 0.0) for n in names):.6f}"] if calibration else []
        table.add_row(label, kind, f"{8 * size / count:.3f}", f"{size:,}", f"{100 * size / total:.1f} %", *lost)
    table.add_section()
    lost = [f"{planned.expected_loss:.6f}"] if calibration else []
    table.add_row("weights", "", f"{8 * total / weights:.3f}", f"{total:,}", "", *lost)
    table.add_row("other files, at most", "", "", f"{planned.overhead:,}", "")
    files = total + planned.overhead
    table.add_row("all files, at most", "", "", f"{files:,}", "")
    _out.print(table)
    if calibration:
        _out.print(
            f"expected loss: KL divergence, nats per token, by the measured sensitivity of each matrix "
            f"(calibrated on {calibration.on.text}, {calibration.on.tokens:,} tokens)"
        )
    _out.print(f"files: at most {gb(files)}")
    context = min(planned.options.context or DEFAULT_CONTEXT, planned.context)
    memory = planned.memory(checkpoint.config, context)
    _out.print(
        f"the bundle's context is {planned.context:,} tokens; memory when run with {context:,}: "
        f"{gb(memory.peak)}, of which {gb(memory.cache)} are the KV cache in {memory.kv}"
    )
    _speed(planned)


def _short(name: str) -> str:
    """A tensor's name without what all of its kind share."""
    return re.sub(r"^(model\.|transformer\.)?((layers|h)\.\d+\.)?|\.weight(?=$|:)", "", name)


def _speed(planned: QuantizationPlan) -> None:
    speeds = load_speeds(get_format(planned.format).ENGINE)
    ms = planned.milliseconds(speeds)
    if ms is None:
        _out.print(f"speed: {speeds.engine} was never measured with these types; run phi-export calibrate-speed")
        return
    _out.print(
        f"predicted decoding: {ms:.1f} ms per token for its matrix products, {1000 / ms:.1f} tokens/s at most "
        f"({speeds.engine}, measured on {speeds.machine})"
    )


def frontier(mixes: dict[str, QuantizationPlan], chosen: str, calibrated: bool) -> None:
    """What each preference gives: bytes, expected loss, predicted time."""
    table = Table(title="the same budget by --prefer", title_justify="left")
    for column in ("--prefer", "weights", "expected loss" if calibrated else "loss, relative", "ms per token"):
        table.add_column(column, justify="left" if column == "--prefer" else "right")
    least = min(m.expected_loss for m in mixes.values())
    for name in PREFERENCES:
        mix = mixes[name]
        ms = mix.milliseconds(load_speeds(get_format(mix.format).ENGINE))
        lost = f"{mix.expected_loss:.5f}" if calibrated else f"{mix.expected_loss / max(least, 1e-30):.2f}"
        label = f"{name} (this one)" if name == chosen else name
        table.add_row(label, gb(mix.weight_bytes), lost, "not measured" if ms is None else f"{ms:.2f}")
    _out.print(table)


@contextmanager
def export_progress() -> Iterator[ExportProgress]:
    """A bar per format, with an estimate of what is left; in a log, a line every half minute."""
    if not _err.is_terminal:
        told = -math.inf

        def log(name: str, what: str, done: int, total: int) -> None:
            nonlocal told
            if time.monotonic() - told >= _LOG_EVERY or what == "done":
                told = time.monotonic()
                _err.print(f"{name}: {what} ({100 * done // max(1, total)} %)", soft_wrap=True)

        yield log
        return
    columns = (
        TextColumn("{task.fields[format]:<7}"),
        BarColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=_err) as bars:
        tasks = {}

        def progress(name: str, what: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(what, format=name, total=total)
            bars.update(tasks[name], description=what, completed=done)

        yield progress


@contextmanager
def spinner(what: str) -> Iterator[Callable[[str], None]]:
    """A line that says what is being looked at; in a log, one line for all of it."""
    if not _err.is_terminal:
        _err.print(what)
        yield lambda _: None
        return
    with _err.status(what) as status:
        yield lambda detail: status.update(f"{what} {detail}")


def exported(bundles: list[Exported]) -> None:
    """The table of bundles that were written."""
    table = Table(title=f"{bundles[0].folder.parent}:", title_justify="left")  # fits into 80 columns
    for column in ("bundle", "files", "bits/weight", "KL", "top-1", "written", "verified"):
        table.add_column(column, justify="left" if column == "bundle" else "right")
    for b in bundles:
        table.add_row(
            b.folder.name,
            gb(b.manifest.file_bytes()),
            f"{b.manifest.bits_per_weight():.3f}",
            f"{b.parity.kld_mean:.4f}",
            f"{100 * b.parity.top1_agreement:.1f} %",
            f"{b.write_s:.1f} s",
            f"{b.verify_s:.1f} s",
        )
    _out.print(table)
    for b in bundles:
        if b.manifest.quality is not None:
            judged(b.folder, b.manifest.quality, b.manifest.calibration is not None)
    tokens = bundles[0].parity.tokens
    if bundles[0].manifest.source.random:
        _out.print("the checkpoint's weights are random: sizes and speeds are real, quality means nothing")
    if bundles[0].manifest.chat is None:
        _out.print("its chat template is none that phi_runtime knows: chat() wants to be told the format there")
    _out.print(f"verified over {tokens} tokens of the built-in sample; `phi-export verify --text FILE` takes more")


def judged(bundle: Path, q: HeldOut, calibrated: bool) -> None:
    """What the quality gate found, in words."""
    text = "the built-in text" if q.text == BUILT_IN else q.text
    figures = (
        f"on {q.tokens:,} held-out tokens of {text}, perplexity goes from {q.checkpoint_perplexity:.2f} to "
        f"{q.perplexity:.2f} ({100 * q.rise:+.1f} %), the likeliest next token stays the same at "
        f"{100 * q.top1_agreement:.0f} % of the positions, KL divergence {q.kld_mean:.4f} nats"
    )
    if q.rise <= NOTED:
        _out.print(f"{bundle.name}: close to the checkpoint: {figures}")
        return
    cure = "more bytes (--memory)" if calibrated else "calibration (leave --fast out), or more bytes (--memory)"
    where = "; --dry-run shows which tensors cost most" if calibrated else ""
    _out.print(f"[bold]WARNING[/bold] {bundle.name}: THIS MODEL LOST QUALITY: {figures}. What mends it: {cure}{where}")


def verified(bundle: Path, outcome: Verification) -> None:
    """The table of checks, and the agreement."""
    table = Table(title=str(bundle), title_justify="left")
    for column in ("check", "figure", "limit", "where", ""):
        table.add_column(column, justify="right" if column in ("figure", "limit") else "left")
    for c in outcome.checks:
        table.add_row(c.name, f"{c.value:.3g}", f"{c.limit:.3g}", c.where, "ok" if c.passed else "FAILED")
    _out.print(table)
    if (p := outcome.parity) is not None:
        _out.print(
            f"{p.tokens} tokens: KL divergence {p.kld_mean:.5f} nats, top-1 agreement {100 * p.top1_agreement:.2f} %, "
            f"perplexity {p.perplexity:.3f} (checkpoint {p.checkpoint_perplexity:.3f})"
        )
        if outcome.quality is not None:
            judged(bundle, outcome.quality, (bundle / FILE).is_file())
        if p.layer_errors:
            worst = max(range(len(p.layer_errors)), key=p.layer_errors.__getitem__)
            _out.print(
                f"change of the activations by rounding the weights: {p.layer_errors[0]:.3g} after the first layer, "
                f"{p.layer_errors[-1]:.3g} after the last, at most {p.layer_errors[worst]:.3g} (layer {worst})"
            )


def speeds(path: Path, table: dict[str, object]) -> None:
    """The table that `calibrate-speed` measured."""
    shown = Table(title=f"{table['unit']}: {table['machine']}", title_justify="left")
    for column in ("engine", "type", "ns/weight", "phi-3-mini, ms per token"):
        shown.add_column(column, justify="left" if column in ("engine", "type") else "right")
    engines = table["engines"]
    assert isinstance(engines, dict)
    for engine, kinds in engines.items():
        for kind, ns in sorted(kinds.items(), key=lambda k: k[1]):
            shown.add_row(engine, kind, f"{ns:.4f}", f"{ns * 3722.6:.1f}")
    _out.print(shown)
    _out.print(f"{path}: plans use it from now on")


def findings(found: list[Finding]) -> None:
    """What the linter found, the worst first."""
    for f in sorted(found, key=lambda f: not f.refused):
        _out.print(f"{'refused' if f.refused else 'slow'}: {f.where}: {f.what}")
    if not found:
        _out.print("nothing that a device would refuse or run slowly")
