"""Holding a bundle to its checkpoint. It fails closed: every check must pass.

1. `files`: every file is the one the manifest describes.
2. `weights`: what the artifact stores, read back, is the checkpoint's tensor up to the rounding
   its type allows, block by block.
3. `graph`: the artifact run by its own runtime gives the logits of the reference computation on
   those same weights. How far its arithmetic alone may move them is not guessed: the reference
   imitates it on the same tokens. Here a wrong RoPE, mask or wiring shows.
4. `quality`: the loss against the checkpoint itself is one of rounding, not of breakage.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phi_export.compare import Agreement, windows
from phi_export.formats import get_format
from phi_runtime.backends import open_backend
from phi_runtime.backends.reference import ReadTensor, ReferenceBackend
from phi_runtime.bundle import Manifest, Parity, check_files, find_bundle, read_manifest
from phi_runtime.checkpoint import F32, Checkpoint
from phi_runtime.engine import Engine
from phi_runtime.errors import BundleError, CheckpointError, PhiError, UsageError, VerificationError
from phi_runtime.tokenizer import Tokenizer

DEFAULT_TOKENS = 256
WINDOW = 512  # tokens read from an empty context at a time

# Rounding to the nearest of 16 steps under a scale that reaches the largest weight m errs by at
# most m/16 a weight: in a block of 32 that is 1/8 of the block's energy at the very worst.
MAX_BLOCK_ERROR = 0.15
# Over a whole tensor it is a few per cent of that; two tensors mixed up give about 2.
MAX_TENSOR_ERROR = 0.03
MAX_VECTOR_ERROR = 1e-6
MAX_KLD = 1.0

_SAMPLE = Path(__file__).with_name("sample.txt")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: the figure, the limit it is held to, and which part was worst."""

    name: str
    value: float
    limit: float
    where: str

    @property
    def passed(self) -> bool:
        """NaN fails."""
        return self.value <= self.limit


@dataclass(frozen=True)
class Verification:
    """The outcome: all checks, and the agreement where the artifact could be run at all."""

    checks: tuple[Check, ...]
    parity: Parity | None

    @property
    def passed(self) -> bool:
        """Whether everything was looked at and every check passed."""
        return self.parity is not None and all(c.passed for c in self.checks)

    def require(self, folder: Path) -> Parity:
        """The agreement of a bundle that passed. Raises VerificationError otherwise."""
        if self.parity is None or not self.passed:
            c = next(c for c in self.checks if not c.passed)
            figure = "" if np.isinf(c.value) else f" ({c.value:.3g}, at most {c.limit:.3g} is allowed)"
            raise VerificationError(f"{folder}: does not agree with its checkpoint: {c.name}: {c.where}{figure}")
        return self.parity


def verify(
    bundle: Path,
    checkpoint: Checkpoint,
    tokens: list[int] | None = None,
    progress: Progress = lambda _: None,
) -> Verification:
    """Hold a bundle with a manifest to a checkpoint, over `tokens` (by default a built-in sample).

    Raises NotFoundError where there is no bundle, UsageError if it is of another architecture; a
    bundle that is there but broken is a Verification that did not pass.
    """
    bundle = find_bundle(bundle)
    manifest = read_manifest(bundle)
    return verify_manifest(bundle, manifest, checkpoint, tokens, progress)


def verify_manifest(
    bundle: Path, manifest: Manifest, checkpoint: Checkpoint, tokens: list[int] | None, progress: Progress
) -> Verification:
    """As `verify`, for a bundle whose manifest is not written yet."""
    if manifest.config() != checkpoint.config:
        raise UsageError(f"{bundle}: is not of the architecture of {checkpoint.folder}; give its own checkpoint")
    tokens = sample_tokens(checkpoint) if tokens is None else tokens
    if len(tokens) < 2:
        raise UsageError("verification needs at least two tokens of text")
    checks: list[Check] = []
    try:
        progress("files")
        check_files(bundle, manifest)
        read = get_format(manifest.format).read(bundle, manifest.artifact)
        checks += _check_weights(read, checkpoint, progress)
        graph, arithmetic, quality = _run(bundle, manifest, checkpoint, read, tokens, progress)
    except BundleError as e:
        return Verification((*checks, Check("files", np.inf, 0, str(e))), None)
    where = f"over {quality.tokens} tokens"
    allowed = get_format(manifest.format).ROUNDING_MARGIN * arithmetic.logit_error
    checks.append(Check("graph", graph.logit_error, allowed, f"relative error of the logits {where}"))
    checks.append(Check("quality", quality.kld_mean, MAX_KLD, f"mean KL divergence {where}, nats"))
    parity = Parity(
        tokens=quality.tokens,
        logit_error=graph.logit_error,
        kld_mean=quality.kld_mean,
        top1_agreement=quality.top1_agreement,
        perplexity=quality.perplexity_q,
        checkpoint_perplexity=quality.perplexity_p,
    )
    return Verification(tuple(checks), parity)


def sample_tokens(checkpoint: Checkpoint, text: Path | None = None, count: int = DEFAULT_TOKENS) -> list[int]:
    """The first `count` tokens of a text, by default of the built-in sample.

    Raises UsageError for a text that cannot be read or is too short.
    """
    path = text or _SAMPLE
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: cannot be read as UTF-8 text ({e}); give another --text") from None
    tokens = Tokenizer(checkpoint.folder).encode(content)[:count]
    if tokens and max(tokens) >= checkpoint.config.vocab_size:
        raise CheckpointError(f"{checkpoint.folder}: its tokenizer gives tokens beyond the embedding")
    if len(tokens) < 2:
        raise UsageError(f"{path}: gives {len(tokens)} tokens; at least two are needed")
    return tokens


def _check_weights(read: ReadTensor, checkpoint: Checkpoint, progress: Progress) -> list[Check]:
    """Every stored tensor against the checkpoint's; one check for blocks, tensors and vectors each."""
    worst = {"block": (0.0, ""), "tensor": (0.0, ""), "vector": (0.0, "")}
    for name, tensor in checkpoint.tensors.items():
        progress(name)
        stored, original = read(name), tensor.read()
        if stored.shape != original.shape:
            return [Check("weights", np.inf, 0, f"{name} has shape {stored.shape}, the checkpoint {original.shape}")]
        if original.ndim == 1:
            error = np.abs(stored - original).max() / np.abs(original).max()
            worst["vector"] = max(worst["vector"], (_nan_is_worst(error), name))
            continue
        errors = _block_errors(stored, original)
        worst["block"] = max(worst["block"], (_nan_is_worst(errors.max()), f"{name}, block {errors.argmax()}"))
        whole = np.square(stored - original).sum() / max(float(np.square(original).sum()), 1e-30)
        worst["tensor"] = max(worst["tensor"], (_nan_is_worst(whole), name))
    limits = {"block": MAX_BLOCK_ERROR, "tensor": MAX_TENSOR_ERROR, "vector": MAX_VECTOR_ERROR}
    return [
        Check("weights", value, limits[kind], f"relative error of the worst {kind}, {where}")
        for kind, (value, where) in worst.items()
    ]


def _block_errors(stored: F32, original: F32) -> F32:
    """Squared error of each run of 32 weights relative to its energy; runs of next to nothing count for nothing."""
    a, b = stored.reshape(-1, 32), original.reshape(-1, 32)
    energy = np.square(b).sum(axis=1)
    floor = 1e-6 * float(energy.mean()) + 1e-30
    errors: F32 = np.square(a - b).sum(axis=1) / (energy + floor)
    return errors


def _nan_is_worst(value: float) -> float:
    return float("inf") if np.isnan(value) else float(value)


def _run(
    bundle: Path,
    manifest: Manifest,
    checkpoint: Checkpoint,
    read: ReadTensor,
    tokens: list[int],
    progress: Progress,
) -> tuple[Agreement, Agreement, Agreement]:
    """Against the reference on the bundle's own weights: its logits, and the imitation of its
    arithmetic; against the checkpoint: its logits.
    """
    graph, arithmetic, quality = Agreement(), Agreement(), Agreement()
    rounding = get_format(manifest.format).rounding
    length = min(WINDOW, manifest.context)
    backend = open_backend(bundle, manifest, None, None, None)
    try:
        for i, piece in enumerate(windows(tokens, length)):
            progress(f"logits, tokens {i * length} to {i * length + len(piece)}")
            try:
                logits = Engine(backend, ()).logits(piece)
            except PhiError as e:
                raise BundleError(str(e)) from e
            config, count, targets = checkpoint.config, len(piece), piece[1:]
            stored = ReferenceBackend(config, read, count).forward(piece, True)
            graph.add(stored, logits, targets)
            arithmetic.add(stored, ReferenceBackend(config, read, count, rounding).forward(piece, True), targets)
            quality.add(ReferenceBackend(config, checkpoint.read, count).forward(piece, True), logits, targets)
    finally:
        backend.close()
    return graph, arithmetic, quality
