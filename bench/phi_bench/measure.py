"""Measuring bundles: speed in rounds that take turns, quality against the checkpoint."""

import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import phi_runtime
from phi_bench.worker import Speed
from phi_export.verify.logits import WINDOW
from phi_export.verify.metrics import Agreement, windows
from phi_export.verify.text import sample_tokens
from phi_runtime.architecture.checkpoint import Checkpoint, open_checkpoint
from phi_runtime.architecture.config import num_parameters, read_json
from phi_runtime.backends import record
from phi_runtime.backends.reference import Reference
from phi_runtime.errors import BundleError, UsageError
from phi_runtime.package.manifest import Manifest, find_bundle, read_manifest
from phi_runtime.planning.machine import machine

PROMPTS = (
    'def read_lines(path):\n    """Return the lines of',
    "class Queue:\n    def __init__(self",
    "import os\nimport sys\n\n\ndef main(",
)
SAMPLE_TOKENS = 72

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Result:
    """One bundle on one backend. Quality is None where no checkpoint was given.

    decode_tps and the like are medians over the rounds; bytes are of the bundle's files, the
    manifest not counted; KL divergence is in nats, against the checkpoint in float32 arithmetic.
    """

    name: str
    format: str
    backend: str
    file_bytes: int
    bits_per_weight: float
    prompt_tokens: int
    decode_tokens: int
    load_s: float
    ttft_s: float
    prompt_tps: float
    decode_tps: float
    peak_rss_bytes: int
    perplexity: float | None
    kld_mean: float | None
    top1_agreement: float | None
    samples: list[str]


@dataclass(frozen=True)
class Subject:
    """A bundle and one of the backends that run it here."""

    bundle: Path
    manifest: Manifest
    backend: str


@dataclass(frozen=True)
class Report:
    """Everything that was measured, and on what."""

    machine: dict[str, Any]
    settings: dict[str, Any]
    checkpoint: dict[str, Any] | None
    results: list[Result]

    def to_json(self) -> str:
        """The content of report.json."""
        return json.dumps(asdict(self), indent=1) + "\n"


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
    settings = {
        "rounds": rounds,
        "quality_tokens": agreements[0].tokens if agreements[0] else None,
        "prompts": list(PROMPTS),
        "random_weights": any(m.source.random for m in manifests),
    }
    return Report(machine(), settings, _describe(checkpoint, agreements[0]), results)


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
        samples=samples,
    )


def _describe(checkpoint: Checkpoint | None, agreement: Agreement | None) -> dict[str, Any] | None:
    """The checkpoint's own row, and how it was trained where its folder tells."""
    if checkpoint is None:
        return None
    training = checkpoint.folder / "training"
    log, recipe = training / "log.jsonl", training / "recipe.json"
    lines = [json.loads(line) for line in log.read_text().splitlines()] if log.is_file() else []
    return {
        "name": read_json(recipe)["name"] if recipe.is_file() else checkpoint.folder.resolve().name,
        "parameters": num_parameters(checkpoint.config),
        "file_bytes": sum(f.stat().st_size for f in checkpoint.folder.iterdir() if f.is_file()),
        "bits_per_weight": 8 * sum(t.nbytes for t in checkpoint.tensors.values()) / num_parameters(checkpoint.config),
        "perplexity": agreement.perplexity_p if agreement else None,
        "training": read_json(training / "summary.json") if (training / "summary.json").is_file() else None,
        "loss": [[line["step"], line["loss"]] for line in lines],
    }
