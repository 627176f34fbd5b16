"""The bundle contract: `phi-bundle.json`, which says what an exported artifact is.

This module is the manifest's sole reader and writer. The artifact beside it is an ordinary file
of its own ecosystem and never needs the manifest.
"""

from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import msgspec

from phi_runtime.architecture.config import Config, parse_config
from phi_runtime.contract import Amount, Contract, Count, Size, StrictContract, encode, read_record
from phi_runtime.errors import BundleError, NotFoundError
from phi_runtime.files import sha256, write_file
from phi_runtime.package.formats import FORMATS

VERSION = 1
MANIFEST = "phi-bundle.json"
_REMEDY = "export the bundle again"


class BundleFile(Contract, frozen=True):
    """One file of the bundle; `path` is relative to it, with forward slashes."""

    path: str
    bytes: Size
    sha256: str

    def __post_init__(self) -> None:
        _check_inside(self.path)


class Source(Contract, frozen=True):
    """The checkpoint a bundle was made from: its name and the digest of its weight files.

    random: its weights were drawn, not trained, so that its quality means nothing.
    """

    name: str
    revision: str | None
    sha256: dict[str, str]
    random: bool = False


class TensorQuant(Contract, frozen=True):
    """How one tensor of the checkpoint is stored: type, elements per scale, weights and bytes."""

    type: str
    block: Count
    weights: Count
    bytes: Count


class ExportOptions(StrictContract, frozen=True):
    """How an artifact is laid out; each field is an option of `phi-export`.

    profile: of the format's `PROFILES`, None for the first. context: tokens of a fixed-size cache (Core ML).
    split_qkv: type queries, keys and values apart (GGUF). int8_kv: a second graph, whose cache is of 8 bits (ONNX,
    calibrated).
    """

    profile: str | None = None
    context: int | None = None
    split_qkv: bool = False
    int8_kv: bool = False


class Parity(Contract, frozen=True):
    """How the bundle's logits agreed with the checkpoint's when it was verified.

    KL(checkpoint || bundle) in nats, perplexities per token; `logit_error` is against the reference
    computation on the bundle's own weights, relative to its logits' root mean square. `layer_errors`: after
    each layer, what rounding the weights changed in the activations, relative to them.
    """

    tokens: Count
    logit_error: Amount
    kld_mean: Amount
    top1_agreement: Amount
    perplexity: Amount
    checkpoint_perplexity: Amount
    layer_errors: tuple[Amount, ...] = ()


class CalibratedOn(Contract, frozen=True):
    """The text that the quantiser was calibrated on: its name, its tokens, and the digest of both it and the
    checkpoint.
    """

    text: str
    tokens: Count
    digest: str


class HeldOut(Contract, frozen=True):
    """What the bundle costs on text that calibration has not seen: KL(checkpoint || bundle) in nats per token, the
    share of positions with the same token most likely, and both perplexities. text: what it was called.
    """

    text: str
    tokens: Count
    kld_mean: Amount
    top1_agreement: Amount
    perplexity: Amount
    checkpoint_perplexity: Amount

    @property
    def rise(self) -> float:
        """By how much the perplexity rose, relative to the checkpoint's."""
        return self.perplexity / self.checkpoint_perplexity - 1


class Likeliest(Contract, frozen=True):
    """The likeliest next tokens at a position, and their natural-log probabilities."""

    tokens: tuple[Size, ...]
    logprobs: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.tokens or len(self.tokens) != len(self.logprobs):
            raise ValueError("tokens and logprobs are not as many as each other")


class SelfTest(Contract, frozen=True):
    """A text, and what the reference computes of it from the bundle's own weights at its last positions: see
    `phi_runtime.package.self_test`.
    """

    tokens: Annotated[tuple[Size, ...], msgspec.Meta(min_length=1, max_length=256)]
    expected: Annotated[tuple[Likeliest, ...], msgspec.Meta(min_length=1, max_length=256)]

    def __post_init__(self) -> None:
        if len(self.expected) > len(self.tokens):
            raise ValueError("more positions are expected than there are tokens")


class Manifest(Contract, frozen=True):
    """Everything a client may want to know before it opens the artifact.

    architecture: the checkpoint's `config.json`. self_test: for an engine on a device where nobody verified it.
    """

    format: Annotated[str, msgspec.Meta(extra_json_schema={"enum": list(FORMATS)})]
    artifact: str
    source: Source
    architecture: dict[str, Any]
    context: Count
    window: Count | None
    stop_tokens: tuple[Size, ...]
    chat: str | None
    quantization: Annotated[dict[str, TensorQuant], msgspec.Meta(min_length=1)]
    files: Annotated[tuple[BundleFile, ...], msgspec.Meta(min_length=1)]
    options: ExportOptions = ExportOptions()
    calibration: CalibratedOn | None = None
    parity: Parity | None = None
    quality: HeldOut | None = None
    self_test: SelfTest | None = None
    version: Literal[1] = 1

    def __post_init__(self) -> None:
        _check_inside(self.artifact)
        if self.format not in FORMATS:
            raise ValueError(f"format {self.format!r} is none of {', '.join(FORMATS)}")

    def config(self) -> Config:
        """The architecture, checked."""
        return parse_config(self.architecture, Path(MANIFEST))

    def file_bytes(self) -> int:
        """Bytes of all files of the bundle, the manifest not counted."""
        return sum(f.bytes for f in self.files)

    def bits_per_weight(self) -> float:
        """Stored bits of the weights, scales included, per weight."""
        stored = sum(q.bytes for q in self.quantization.values())
        return 8 * stored / sum(q.weights for q in self.quantization.values())


class _Version(Contract, frozen=True):
    """The one field that every version has."""

    version: Count


def list_files(folder: Path) -> tuple[BundleFile, ...]:
    """Every file of a bundle folder but the manifest, with size and digest."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return tuple(BundleFile(p.relative_to(folder).as_posix(), p.stat().st_size, sha256(p)) for p in paths)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `phi-bundle.json` into the bundle's folder."""
    write_file(folder / MANIFEST, encode(manifest))


def find_bundle(path: str | Path) -> Path:
    """The folder of a bundle, given it or the artifact in it. Raises NotFoundError."""
    path = Path(path)
    if not path.exists():
        raise NotFoundError(f"{path}: no such file or folder; give a bundle that phi-export wrote")
    for folder in (path, path.parent):
        if (folder / MANIFEST).is_file():
            return folder
    raise NotFoundError(f"{path}: holds no {MANIFEST}; give a bundle that phi-export wrote")


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of a bundle folder.

    Raises NotFoundError if there is none, BundleError if it is damaged or newer than we are.
    """
    path = find_bundle(folder) / MANIFEST
    version = read_record(path, _Version, BundleError, _REMEDY).version
    if version > VERSION:
        raise BundleError(f"{path}: manifest version {version} is newer than ours ({VERSION}); upgrade phi-edge")
    manifest = read_record(path, Manifest, BundleError, _REMEDY)
    parse_config(manifest.architecture, path)
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Hold every file of the bundle to its recorded size and digest, and see that none is unrecorded.

    Raises BundleError.
    """
    recorded = {f.path for f in manifest.files}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST):
        if path.relative_to(folder).as_posix() not in recorded:
            raise BundleError(f"{path}: is not in the bundle's manifest; move it away or export the bundle again")
    if not (folder / manifest.artifact).exists():
        raise BundleError(f"{folder / manifest.artifact}: is missing from the bundle; export it again")
    for f in manifest.files:
        path = folder / f.path
        if not path.is_file():
            raise BundleError(f"{path}: is missing from the bundle; export it again")
        if path.stat().st_size != f.bytes:
            raise BundleError(f"{path}: has {path.stat().st_size} bytes, the manifest says {f.bytes}; export it again")
        if sha256(path) != f.sha256:
            raise BundleError(f"{path}: differs from the file that was verified (sha256); export it again")


def _check_inside(value: str) -> None:
    """Raise ValueError for a path that leaves the bundle, or that systems cannot open."""
    path = PurePosixPath(value)
    long = len(value) > 1024 or any(len(part.encode()) > 255 for part in path.parts)
    if path.is_absolute() or ".." in path.parts or "\\" in value or not path.parts or long:
        raise ValueError(f"path {value!r} leaves the bundle")
