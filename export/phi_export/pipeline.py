"""The pipeline: read, plan, quantize and write, verify; then, and only then, rename into place."""

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path

import msgspec

from phi_export.allocate import Budget, QuantizationPlan, plan_mix, weight_error
from phi_export.calibrate.calibration import Calibration, CalibrationText, calibrate
from phi_export.calibrate.equalise import equalised, write_scales
from phi_export.defaults import BUILT_IN
from phi_export.formats import Format, Uncalibrated, get_format, sidecar_files
from phi_export.formats.parallel_writer import ParallelWriter
from phi_export.verify.gate import HeldOutText, held_out_windows
from phi_export.verify.manifest import describe_source
from phi_export.verify.text import sample_tokens
from phi_export.verify.verification import verify_manifest
from phi_runtime.architecture.checkpoint import Checkpoint, open_checkpoint, stop_tokens
from phi_runtime.backends import cores, record
from phi_runtime.errors import CheckpointError, MissingExtraError, OutputExistsError, PhiError
from phi_runtime.files import replace_folder, resumable_folder
from phi_runtime.package.manifest import (
    MANIFEST,
    ExportOptions,
    Manifest,
    Parity,
    Source,
    list_files,
    read_manifest,
    write_manifest,
)
from phi_runtime.planning.speed import load_speeds
from phi_runtime.text.chat_templates import chat_name
from phi_runtime.text.tokenizer import Tokenizer
from phi_runtime.version import __version__

# Told (format, what is being done, done so far, of how many).
Progress = Callable[[str, str, int, int], None]


@dataclass(frozen=True)
class Exported:
    """A bundle that was written and verified, and how long either took."""

    folder: Path
    manifest: Manifest
    parity: Parity
    write_s: float
    verify_s: float


def plan(
    checkpoint: Checkpoint,
    formats: tuple[str, ...],
    budget: Budget | None = None,
    options: ExportOptions | None = None,
    calibration: Calibration | None = None,
    to_calibrate: bool = False,
) -> list[QuantizationPlan]:
    """How each format will store each tensor, from the headers and the calibration alone; without one that is still
    `to_calibrate`, as far as that goes.

    Raises UsageError for an unknown format or a budget that cannot be met, UnsupportedError for a model or a
    width that a format cannot carry.
    """
    options = options or ExportOptions()
    planned = []
    for name in formats:
        module = get_format(name)
        module.check(checkpoint.config, options)
        model, known = as_format(module, checkpoint, calibration)
        options = msgspec.structs.replace(options, int8_kv=(to_calibrate or known is not None) and module.HAS_INT8_KV)
        loss = known.losses(module, model, options) if known else weight_error
        speeds = load_speeds(module.ENGINE)
        planned.append(plan_mix(name, module, model, options, budget or Budget(None), speeds, loss))
    return planned


def as_format(
    module: Format, checkpoint: Checkpoint, calibration: Calibration | None
) -> tuple[Checkpoint, Calibration | None]:
    """The model that a format's bundles hold, and the calibration of it: equalised, or as it is."""
    if calibration is None:
        return checkpoint, None
    if module.EQUALISED:
        return equalised(checkpoint, calibration.scales), replace(calibration, scaled=True)
    return checkpoint, calibration.unscaled()


def export(
    checkpoint: str | Path | Checkpoint,
    out: str | Path,
    formats: tuple[str, ...],
    force: bool = False,
    progress: Progress = lambda *_: None,
    budget: Budget | None = None,
    options: ExportOptions | None = None,
    tokens: int | None = None,
    threads: int | None = None,
    text: CalibrationText | None = None,
    accept_loss: bool = False,
) -> list[Exported]:
    """Write `out`/FORMAT for each format, verified against the checkpoint over `tokens` tokens.

    A new `out` appears at once, with all formats in it, or not at all. `force` replaces the bundles
    that are there, each at once, after all were verified. With a `text` it is calibrated on that, and judged by what
    calibration leaves unread of it; with `accept_loss`, whatever the outcome. An export that was interrupted goes on at
    the layer or tensor where it stopped.

    Raises the errors of `open_checkpoint`, `calibrate` and `plan`,
    OutputExistsError, MissingExtraError, VerificationError.
    """
    out = Path(os.path.realpath(out))
    check_runtimes(formats)
    source = checkpoint if isinstance(checkpoint, Checkpoint) else open_checkpoint(checkpoint)
    planned = plan(source, formats, budget, options, to_calibrate=text is not None)
    _check_tokenizer(source)
    _check_output(out, formats, force)
    sample = sample_tokens(source, None, tokens)
    progress(planned[0].format, "digesting the checkpoint", 0, 2 * len(planned[0].plan))
    described = describe_source(source)
    held_out = None
    if not described.random:
        name = text.text if text else BUILT_IN
        held_out = HeldOutText(source, name, held_out_windows(source, name), accept_loss)
    calibration = None
    if text is not None:

        def calibrating(what: str) -> None:
            progress(planned[0].format, f"calibrating: {what}", 0, 2 * len(planned[0].plan))

        calibration = calibrate(source, described, text, calibrating)
        planned = plan(source, formats, budget, options, calibration)
    job = _Job(source, described, stop_tokens(source), sample, held_out, threads or cores(), progress, calibration)
    bundles = []
    with resumable_folder(out, _key(described, planned, calibration)) as stage:
        for p in planned:
            written = job.bundle(p, stage / p.format)
            size = written.manifest.file_bytes() + (stage / p.format / MANIFEST).stat().st_size
            if budget is not None and budget.memory is not None and size > budget.memory:
                raise PhiError(f"{p.format}: took {size:,} bytes, more than the budget; please report this as a bug")
            bundles.append(written)
        _check_output(out, formats, force)  # again: something may have appeared there meanwhile
        if out.exists():
            for p in planned:
                replace_folder(stage / p.format, out / p.format)
        else:
            replace_folder(stage, out)
    return [replace(b, folder=out / b.folder.name) for b in bundles]


@dataclass(frozen=True)
class _Job:
    """What the bundles of one export share."""

    source: Checkpoint
    described: Source
    stops: tuple[int, ...]
    sample: list[int]
    held_out: HeldOutText | None
    threads: int
    progress: Progress
    calibration: Calibration | None

    def bundle(self, planned: QuantizationPlan, folder: Path) -> Exported:
        """Write one bundle, what an earlier run left of it included, and verify it."""
        folder.mkdir(exist_ok=True)
        if (folder / MANIFEST).is_file():
            found = read_manifest(folder)
            if found.parity is not None and found.parity.tokens == len(self.sample):
                return Exported(folder, found, found.parity, 0.0, 0.0)  # an earlier run came this far
        module = get_format(planned.format)
        source, calibration = as_format(module, self.source, self.calibration)
        steps = 2 * len(planned.plan)
        done = 0

        def step(what: str) -> None:
            nonlocal done
            done = min(done + 1, steps)
            self.progress(planned.format, what, done, steps)

        began = time.perf_counter()
        stream = ParallelWriter(
            folder.with_name(f"{planned.format}.journal"), self.threads, lambda name: step(f"writing {name}")
        )
        module.write(source, planned.plan, planned.options, folder, stream, calibration or Uncalibrated())
        stream.close()
        (folder / MANIFEST).unlink(missing_ok=True)
        if self.calibration is not None and module.EQUALISED:
            write_scales(folder, self.calibration.scales)
        for name in sidecar_files(module):
            if (self.source.folder / name).is_file():
                shutil.copyfile(self.source.folder / name, folder / name)
        manifest = Manifest(
            format=planned.format,
            artifact=module.artifact(folder),
            source=self.described,
            architecture=self.source.config.to_json(),
            context=planned.context,
            window=self.source.config.sliding_window,
            stop_tokens=self.stops,
            chat=chat_name(self.source.folder),
            quantization=planned.plan,
            files=list_files(folder),
            options=planned.options,
            calibration=self.calibration.on if self.calibration else None,
        )
        write_manifest(folder, manifest)
        wrote = time.perf_counter()
        outcome = verify_manifest(
            folder, manifest, self.source, self.sample, lambda what: step(f"verifying {what}"), True, self.held_out
        )
        parity = outcome.require(Path(planned.format))
        manifest = msgspec.structs.replace(
            manifest, parity=parity, quality=outcome.quality, self_test=outcome.self_test
        )
        write_manifest(folder, manifest)
        stream.forget()
        self.progress(planned.format, "done", steps, steps)
        return Exported(folder, manifest, parity, wrote - began, time.perf_counter() - wrote)


def _key(described: Source, planned: list[QuantizationPlan], calibration: Calibration | None) -> str:
    """A digest of all that decides the bytes."""
    calibrated = calibration.on.digest if calibration else None
    plans = [(p.format, p.options, {n: q.type for n, q in p.plan.items()}) for p in planned]
    said = msgspec.json.encode([__version__, described, plans, calibrated])
    return hashlib.sha256(said).hexdigest()[:16]


def _check_tokenizer(checkpoint: Checkpoint) -> None:
    tokenizer = Tokenizer(checkpoint.folder)
    if tokenizer.largest_id >= checkpoint.config.vocab_size:
        raise CheckpointError(
            f"{checkpoint.folder}: its tokenizer has ids up to {tokenizer.largest_id}, "
            f"the embedding {checkpoint.config.vocab_size} rows; they are not of one model"
        )


def _check_output(out: Path, formats: tuple[str, ...], force: bool) -> None:
    if not out.exists():
        return
    if not out.is_dir():
        raise OutputExistsError(f"{out}: is a file; choose another --out")
    if not force:
        raise OutputExistsError(f"{out}: exists already; choose another --out, or replace its bundles with --force")
    for name in formats:
        if (out / name).exists() and not (out / name / MANIFEST).is_file():
            raise OutputExistsError(f"{out / name}: is not a bundle, so --force does not replace it; move it away")


def check_runtimes(formats: tuple[str, ...]) -> None:
    """Raise MissingExtraError now for what verification would miss at the end."""
    for name in formats:
        module, extra = record(name).module, record(name).extra
        try:
            found = find_spec(module)
        except ModuleNotFoundError:
            found = None
        if found is None:
            raise MissingExtraError(f"{module}, which verifies {name} bundles,", extra)
