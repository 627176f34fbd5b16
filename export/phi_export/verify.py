"""Holding a bundle to its checkpoint. It fails closed: every check must pass.

1. `files`: every file is the one the manifest describes; what the manifest says of the checkpoint is
   so, and the files that came along with it (tokenizer, configurations) are its own.
2. `weights`: what the artifact stores, read back, is the checkpoint's tensor up to the rounding
   its type allows, block by block.
3. `graph`: the artifact run by its own runtime, prompts and single tokens both, gives the logits of
   the reference computation on those same weights. How far its arithmetic alone may move them is not
   guessed: the reference imitates it on the same tokens. Here a wrong RoPE, mask or wiring shows; a
   wrong window too, because the tokens reach beyond it unless fewer are asked for.
4. `tokenizer`: where the artifact has a tokenizer of its own (GGUF), it makes the same tokens.
5. `quality`: the loss against the checkpoint itself is one of rounding, not of breakage.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from phi_export.compare import Agreement, windows
from phi_export.formats import get_format
from phi_export.quantize import BLOCK
from phi_runtime.backends import open_backend
from phi_runtime.backends.reference import ReadTensor, ReferenceBackend
from phi_runtime.bundle import Manifest, Parity, check_files, find_bundle, read_manifest
from phi_runtime.checkpoint import F32, Checkpoint, stop_tokens
from phi_runtime.engine import Backend
from phi_runtime.errors import BundleError, CheckpointError, PhiError, UnsupportedError, UsageError, VerificationError
from phi_runtime.tokenizer import Tokenizer

DEFAULT_TOKENS = 256  # or as many as reach beyond the model's window
WINDOW = 512  # tokens read from an empty context at a time, or as many
_BEYOND = 64
_SINGLY = 8  # tokens at the end of each piece that are fed one by one, as generation does

# Rounding to the nearest of 16 steps under a scale that reaches the largest weight m errs by at
# most m/16 a weight: in a block of 32 that is 1/8 of the block's energy at the very worst.
MAX_BLOCK_ERROR = 0.15
# Over a whole tensor it is a few per cent of that; two tensors mixed up give about 2.
MAX_TENSOR_ERROR = 0.03
MAX_VECTOR_ERROR = 1e-6
MAX_KLD = 1.0

# What clients of every format find beside the artifact, as it is beside the checkpoint.
COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
)

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
    try:
        manifest = read_manifest(bundle)
    except PhiError as e:
        return _failed("files", str(e))
    return verify_manifest(bundle, manifest, checkpoint, tokens, progress)


def verify_manifest(
    bundle: Path, manifest: Manifest, checkpoint: Checkpoint, tokens: list[int] | None, progress: Progress
) -> Verification:
    """As `verify`, for a bundle whose manifest is not written yet."""
    if manifest.config() != checkpoint.config:
        raise UsageError(f"{bundle}: is not of the architecture of {checkpoint.folder}; give its own checkpoint")
    tokens = sample_tokens(checkpoint) if tokens is None else tokens
    if (wrong := _wrong_claim(bundle, manifest, checkpoint)) is not None:
        return _failed("files", wrong)
    if len(tokens) < 2:
        raise UsageError("verification needs at least two tokens of text")
    checks: list[Check] = []
    try:
        progress("files")
        check_files(bundle, manifest)
        read = get_format(manifest.format).read(bundle, manifest.artifact)
        checks += _check_weights(read, checkpoint, progress)
        if not all(c.passed for c in checks):
            return Verification(tuple(checks), None)
        graph, arithmetic, quality = _run(bundle, manifest, checkpoint, read, tokens, progress)
    except (BundleError, UnsupportedError) as e:
        return _failed("files", str(e), checks)
    except PhiError:
        raise
    except Exception as e:  # whatever reading or running a broken artifact meets: it does not pass
        return _failed("files", f"the artifact cannot be read ({type(e).__name__}: {e})", checks)
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


def _wrong_claim(bundle: Path, manifest: Manifest, checkpoint: Checkpoint) -> str | None:
    """What the bundle says of itself that does not follow from the checkpoint, if anything."""
    module = get_format(manifest.format)
    expected: dict[str, tuple[object, object]] = {
        "stop tokens": (manifest.stop_tokens, stop_tokens(checkpoint)),
        "context": (manifest.context, module.context(checkpoint.config)),
        "window": (manifest.window, checkpoint.config.sliding_window),
        "types of tensors": (manifest.quantization, module.plan(checkpoint.config)),
    }
    for name, (said, is_so) in expected.items():
        if said != is_so:
            return f"the manifest's {name} are not what follows from the checkpoint"
    for name in COMPANIONS:
        original, copy = checkpoint.folder / name, bundle / name
        if original.is_file() and not (copy.is_file() and copy.read_bytes() == original.read_bytes()):
            return f"{copy}: is not the checkpoint's own {name}"
    return None


def _failed(name: str, why: str, checks: list[Check] | None = None) -> Verification:
    return Verification((*(checks or []), Check(name, np.inf, 0, why)), None)


def sample_tokens(checkpoint: Checkpoint, text: Path | None = None, count: int | None = None) -> list[int]:
    """The first `count` tokens of a text; by default, of the built-in sample, enough to see all there is.

    Raises UsageError for a text that cannot be read or is too short.
    """
    path = text or _SAMPLE
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise UsageError(f"{path}: cannot be read as UTF-8 text ({e}); give another --text") from None
    tokens = Tokenizer(checkpoint.folder).encode(content)
    if text is None:  # the sample is short: read it again and again
        wanted = count or max(DEFAULT_TOKENS, (checkpoint.config.window() or 0) + _BEYOND)
        tokens *= -(-wanted // max(1, len(tokens)))
        count = wanted
    tokens = tokens[:count]
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
    """Squared error of each block of weights relative to its energy; blocks of next to nothing count for nothing."""
    a, b = stored.reshape(-1, BLOCK), original.reshape(-1, BLOCK)
    energy = np.square(b).sum(axis=1)
    floor = 1e-6 * float(energy.mean()) + 1e-30
    errors: F32 = np.square(a - b).sum(axis=1) / (energy + floor)
    return errors


def _nan_is_worst(value: float) -> float:
    return float("inf") if np.isnan(value) else float(value)


@runtime_checkable
class HasTokenizer(Protocol):
    """A backend whose artifact brings a tokenizer of its own."""

    def tokenize(self, text: str) -> list[int]:
        """Tokens of a text, special ones recognised, none added."""


def _check_tokenizer(backend: HasTokenizer, checkpoint: Checkpoint) -> None:
    text = _SAMPLE.read_text(encoding="utf-8") + "\n\t  a   b\u00e9\u65e5\U0001f600 x"
    if backend.tokenize(text) != Tokenizer(checkpoint.folder).encode(text):
        raise BundleError("the artifact's own tokenizer splits text otherwise than tokenizer.json; export it again")


def _logits(backend: Backend, piece: list[int]) -> F32:
    """Logits of every position: the most of the piece at once, the last tokens one by one."""
    backend.rewind(0)
    cut = len(piece) - _SINGLY if len(piece) > 2 * _SINGLY else len(piece)
    rows = [backend.forward(piece[:cut], every=True)]
    rows += [backend.forward([token], every=True) for token in piece[cut:]]
    return np.concatenate(rows)


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
    length = min(max(WINDOW, (checkpoint.config.window() or 0) + _BEYOND), manifest.context)
    backend = open_backend(bundle, manifest, None, None, None)
    try:
        if isinstance(backend, HasTokenizer):
            _check_tokenizer(backend, checkpoint)
        for i, piece in enumerate(windows(tokens, length)):
            progress(f"logits, tokens {i * length} to {i * length + len(piece)}")
            logits = _logits(backend, piece)
            config, count, targets = checkpoint.config, len(piece), piece[1:]
            stored = ReferenceBackend(config, read, count).forward(piece, True)
            graph.add(stored, logits, targets)
            arithmetic.add(stored, ReferenceBackend(config, read, count, rounding).forward(piece, True), targets)
            quality.add(ReferenceBackend(config, checkpoint.read, count).forward(piece, True), logits, targets)
    finally:
        backend.close()
    return graph, arithmetic, quality
