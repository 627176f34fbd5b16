"""Measure bundles: speed in interleaved rounds, quality against the checkpoint."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import phi_runtime
from phi_bench.report import CheckpointRow, LossAt, Report, Result, Settings
from phi_bench.worker import Speed
from phi_export.verify.logits import WINDOW
from phi_export.verify.metrics import Agreement, windows
from phi_export.verify.text import sample_tokens
from phi_runtime.architecture.checkpoint import Checkpoint, open_checkpoint
from phi_runtime.architecture.config import num_parameters
from phi_runtime.backends import record
from phi_runtime.backends.reference import Reference
from phi_runtime.contract import Contract, decode, read_record
from phi_runtime.errors import BundleError, CheckpointError, UsageError
from phi_runtime.package.manifest import Manifest, find_bundle, read_manifest
from phi_runtime.planning.machine import machine
from phi_train.trainer.summary import Summary

PROMPTS = (
    'def read_lines(path):\n    """Return the lines of',
    "class Queue:\n    def __init__(self",
    "import os\nimport sys\n\n\ndef main(",
)
SAMPLE_TOKENS = 72

Progress = Callable[[str], None]
_T = TypeVar("_T")
_REMEDY = "move the training folder away to leave it out"


@dataclass(frozen=True)
class Subject:
    """A bundle and one of the backends that run it here."""

    bundle: Path
    manifest: Manifest
    backend: str


def run(
    bundles: list[Path],
    against: Path | None = None,
    text: Path | None = None,
    tokens: int = 4096,
    rounds: int = 3,
    prompt_tokens: int = 256,
    decode_tokens: int = 64,
    progress: Progress = lambda _: None,
) -> Report:
    """Measure bundles. `against` and `text` give quality over the first `tokens` of the text.

    Raises NotFoundError and BundleError for bundles, CheckpointError for the checkpoint, UsageError
    where one of `against` and `text` is missing.
    """
    if (against is None) != (text is None):
        raise UsageError("quality needs both --against CKPT and --text FILE")
    bundles = [find_bundle(b) for b in bundles]
    manifests = [read_manifest(b) for b in bundles]
    checkpoint = open_checkpoint(against) if against is not None else None
    subjects = [
        Subject(b, m, name)
        for b, m in zip(bundles, manifests, strict=True)
        for name in record(m.format).engines
        if name not in record(m.format).on_request
    ]
    speeds: list[list[Speed]] = [[] for _ in subjects]
    for r in range(rounds):
        for measured, subject in zip(speeds, subjects, strict=True):
            progress(f"speed, round {r + 1} of {rounds}: {subject.bundle} on {subject.backend}")
            measured.append(_speed(subject, prompt_tokens, decode_tokens))
    agreements: list[Agreement | None] = [None] * len(subjects)
    if checkpoint is not None and text is not None:
        agreements = list(quality(subjects, checkpoint, sample_tokens(checkpoint, text, tokens), progress))
    results = []
    for subject, measured, agreement in zip(subjects, speeds, agreements, strict=True):
        progress(f"samples: {subject.bundle} on {subject.backend}")
        results.append(_result(subject, measured, agreement))
    settings = Settings(
        rounds=rounds,
        quality_tokens=agreements[0].tokens if agreements[0] else None,
        prompts=PROMPTS,
        random_weights=any(m.source.random for m in manifests),
    )
    return Report(machine(), settings, _describe(checkpoint, agreements[0]), tuple(results))


def quality(subjects: list[Subject], checkpoint: Checkpoint, tokens: list[int], progress: Progress) -> list[Agreement]:
    """Each subject's agreement with the checkpoint; its logits are computed once for all of them."""
    for s in subjects:
        if s.manifest.config() != checkpoint.config:
            raise UsageError(f"{s.bundle}: is not of the architecture of {checkpoint.folder}; give its own checkpoint")
    agreements = [Agreement() for _ in subjects]
    models = [phi_runtime.load(s.bundle, backend=s.backend) for s in subjects]
    length = min(WINDOW, *(m.context for m in models))
    for i, piece in enumerate(windows(tokens, length)):
        progress(f"quality, tokens {i * length} to {i * length + len(piece)} of {len(tokens)}")
        exact = Reference(checkpoint.config.decoder(), checkpoint.read, 0).forward(piece, True)[0]
        for model, agreement in zip(models, agreements, strict=True):
            agreement.add(exact, model.logits(piece), piece[1:])
    for model in models:
        model.close()
    return agreements


def _speed(subject: Subject, prompt_tokens: int, decode_tokens: int) -> Speed:
    bundle = subject.bundle
    command = [sys.executable, "-m", "phi_bench.worker", str(bundle), subject.backend]
    command += [str(prompt_tokens), str(decode_tokens)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        why = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise BundleError(f"{bundle}: could not be measured ({why})")
    return Speed(**json.loads(done.stdout.splitlines()[-1]))


def _result(subject: Subject, speeds: list[Speed], agreement: Agreement | None) -> Result:
    manifest = subject.manifest

    def median(name: str) -> float:
        return float(statistics.median(getattr(s, name) for s in speeds))

    with phi_runtime.load(subject.bundle, backend=subject.backend) as phi:
        samples = [phi.generate(p, max_tokens=SAMPLE_TOKENS, temperature=0.7, top_k=40).text for p in PROMPTS]
    return Result(
        name=subject.bundle.resolve().name,
        format=manifest.format,
        backend=subject.backend,
        file_bytes=manifest.file_bytes(),
        bits_per_weight=manifest.bits_per_weight(),
        prompt_tokens=speeds[0].prompt_tokens,
        decode_tokens=speeds[0].decode_tokens,
        load_s=median("load_s"),
        ttft_s=median("ttft_s"),
        prompt_tps=median("prompt_tps"),
        decode_tps=median("decode_tps"),
        peak_rss_bytes=int(median("peak_rss_bytes")),
        perplexity=agreement.perplexity_q if agreement else None,
        kld_mean=agreement.kld_mean if agreement else None,
        top1_agreement=agreement.top1_agreement if agreement else None,
        samples=tuple(samples),
    )


class _LogLine(Contract, frozen=True):
    """What the page needs of a line of `training/log.jsonl`."""

    step: int
    loss: float


class _Recipe(Contract, frozen=True):
    """What the page needs of `training/recipe.json`."""

    name: str


def _describe(checkpoint: Checkpoint | None, agreement: Agreement | None) -> CheckpointRow | None:
    """The checkpoint's own row, and how it was trained where its folder tells. Raises CheckpointError."""
    if checkpoint is None:
        return None
    training = checkpoint.folder / "training"
    recipe = _read(training / "recipe.json", _Recipe)
    return CheckpointRow(
        name=recipe.name if recipe else checkpoint.folder.resolve().name,
        parameters=num_parameters(checkpoint.config),
        file_bytes=sum(f.stat().st_size for f in checkpoint.folder.iterdir() if f.is_file()),
        bits_per_weight=8 * sum(t.nbytes for t in checkpoint.tensors.values()) / num_parameters(checkpoint.config),
        perplexity=agreement.perplexity_p if agreement else None,
        training=_read(training / "summary.json", Summary),
        loss=_losses(training / "log.jsonl"),
    )


def _losses(log: Path) -> tuple[LossAt, ...]:
    try:
        lines = [decode(line, _LogLine) for line in log.read_bytes().splitlines()] if log.is_file() else []
    except ValueError as e:
        raise CheckpointError(f"{log}: {e}; {_REMEDY}") from None
    return tuple(LossAt(line.step, line.loss) for line in lines)


def _read(path: Path, kind: type[_T]) -> _T | None:
    return read_record(path, kind, CheckpointError, _REMEDY) if path.is_file() else None
