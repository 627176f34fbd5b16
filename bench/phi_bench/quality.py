"""How far a quantised model is from its checkpoint: `phi-bench quality`.

The checkpoint is computed by the reference in float32. What is held to it is a bundle, or anybody's GGUF of the same
model, run by its own engine.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import phi_runtime
from phi_export.verify.logits import WINDOW
from phi_export.verify.metrics import Agreement, windows
from phi_export.verify.text import sample_tokens
from phi_runtime.architecture.checkpoint import Checkpoint, open_checkpoint
from phi_runtime.backends import cores
from phi_runtime.backends.llama_cpp import KV_TYPES, LlamaCppBackend
from phi_runtime.backends.record import EngineOptions
from phi_runtime.backends.reference import Reference
from phi_runtime.errors import UsageError
from phi_runtime.package.manifest import find_bundle, read_manifest

Progress = Callable[[str], None]
# Gives the logits [T, vocab_size] of a text that is read from an empty context.
Logits = Callable[[list[int]], Any]


@dataclass(frozen=True)
class Quality:
    """Agreement of one model with its checkpoint. Divergences are KL(checkpoint || model), nats per token;
    `kld_error` is the standard error of the mean over windows; `by_position` holds (first, last, mean, top-1).
    """

    name: str
    file_bytes: int
    kv: str
    tokens: int
    perplexity: float
    checkpoint_perplexity: float
    kld_mean: float
    kld_error: float
    kld_median: float
    kld_999: float
    kld_max: float
    top1_agreement: float
    by_position: list[tuple[int, int, float, float]]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)


def quality(
    subjects: list[Path],
    against: Path,
    text: Path,
    tokens: int,
    window: int | None = None,
    skip: int = 0,
    kv: str = "f16",
    progress: Progress = lambda _: None,
) -> list[Quality]:
    """Measure bundles and GGUF files over the first `tokens` of a text, in windows that are read from an empty context
    (of 512 tokens, or what all bundles carry); the first `skip` positions of each are read and not counted. `kv` is the
    type of llama.cpp's cache.

    Raises NotFoundError, CheckpointError, BundleError, and UsageError for what is not of the checkpoint's architecture.
    """
    checkpoint = open_checkpoint(against)
    if kv not in KV_TYPES:
        raise UsageError(f"--kv {kv!r} is none of {', '.join(KV_TYPES)}")
    if window is None:
        window = min([WINDOW, *(read_manifest(find_bundle(p)).context for p in subjects if p.suffix != ".gguf")])
    if not 0 <= skip < window - 1:
        raise UsageError(f"--skip {skip} leaves nothing of a window of {window} tokens")
    opened = [open_model(path, checkpoint, window, kv) for path in subjects]
    read = sample_tokens(checkpoint, text, tokens)
    found = hold([logits for _, logits in opened], checkpoint, read, window, skip, progress)
    return [_quality(path, size, kv, a) for path, (size, _), a in zip(subjects, opened, found, strict=True)]


def hold(
    models: list[Logits],
    checkpoint: Checkpoint,
    tokens: list[int],
    window: int,
    skip: int = 0,
    progress: Progress = lambda _: None,
) -> list[Agreement]:
    """Each model's agreement with the checkpoint, whose logits are computed once for all of them."""
    decoder = checkpoint.config.decoder()
    found = [Agreement() for _ in models]
    for i, piece in enumerate(p for p in windows(tokens, window) if len(p) > skip + 1):
        progress(f"tokens {i * window} to {i * window + len(piece)} of {len(tokens)}")
        exact = Reference(decoder, checkpoint.read, 0).forward(piece, True)[0]
        for logits, agreement in zip(models, found, strict=True):
            agreement.add(exact, logits(piece), piece[1:], skip)
    return found


def _quality(path: Path, size: int, kv: str, a: Agreement) -> Quality:
    return Quality(
        name=str(path),
        file_bytes=size,
        kv=kv if path.suffix == ".gguf" or (path / "model.gguf").is_file() else "of the bundle",
        tokens=a.tokens,
        perplexity=a.perplexity_q,
        checkpoint_perplexity=a.perplexity_p,
        kld_mean=a.kld_mean,
        kld_error=a.kld_error,
        kld_median=float(np.median(a.klds)),
        kld_999=float(np.quantile(a.klds, 0.999)),
        kld_max=float(a.klds.max()),
        top1_agreement=a.top1_agreement,
        by_position=a.by_position(),
    )


def open_model(path: Path, checkpoint: Checkpoint, window: int, kv: str) -> tuple[int, Logits]:
    """Bytes of the files of a bundle or GGUF, and the model."""
    config = checkpoint.config
    if path.suffix == ".gguf" and path.is_file():
        artifact, size = path, path.stat().st_size
    else:
        bundle = find_bundle(path)
        manifest = read_manifest(bundle)
        if manifest.config() != config:
            raise UsageError(f"{bundle}: is not of the architecture of {checkpoint.folder}; give its own checkpoint")
        if window > manifest.context:
            raise UsageError(f"{bundle}: has a context of {manifest.context} tokens; give that as --window, or fewer")
        if manifest.format != "gguf":
            return manifest.file_bytes(), phi_runtime.load(bundle).logits
        artifact, size = bundle / manifest.artifact, manifest.file_bytes()
    backend = LlamaCppBackend(artifact, EngineOptions(window, cores(), kv), config.decoder().cache_shape().crossover)
    if backend.vocab_size != config.vocab_size:
        raise UsageError(f"{path}: has {backend.vocab_size} tokens, the checkpoint {config.vocab_size}; is it its own?")

    def logits(tokens: list[int]) -> Any:
        backend.trim(0)
        return backend.forward(tokens, True)

    return size, logits
