"""The bundle contract: `phi-bundle.json`, which says what an exported artifact is.

This module is the manifest's sole reader and writer. The artifact beside it is an ordinary file
of its own ecosystem and never needs the manifest.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from phi_runtime.architecture.config import Config, parse_config
from phi_runtime.errors import BundleError, NotFoundError
from phi_runtime.files import sha256, write_file
from phi_runtime.package.formats import FORMATS

VERSION = 1
MANIFEST = "phi-bundle.json"


_Items = TypeVar("_Items", list[Any], dict[str, Any])


@dataclass(frozen=True)
class BundleFile:
    """One file of the bundle; `path` is relative to it, with forward slashes."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """The checkpoint a bundle was made from: its name and the digest of its weight files.

    random: its weights were drawn, not trained, so that its quality means nothing.
    """

    name: str
    revision: str | None
    sha256: dict[str, str]
    random: bool = False


@dataclass(frozen=True)
class TensorQuant:
    """How one tensor of the checkpoint is stored: type, elements per scale, weights and bytes."""

    type: str
    block: int
    weights: int
    bytes: int


@dataclass(frozen=True)
class Parity:
    """How the bundle's logits agreed with the checkpoint's when it was verified.

    KL(checkpoint || bundle) in nats, perplexities per token; `logit_error` is against the reference
    computation on the bundle's own weights, relative to its logits' root mean square. `layer_errors`: after
    each layer, what rounding the weights changed in the activations, relative to them.
    """

    tokens: int
    logit_error: float
    kld_mean: float
    top1_agreement: float
    perplexity: float
    checkpoint_perplexity: float
    layer_errors: tuple[float, ...] = ()


@dataclass(frozen=True)
class CalibratedOn:
    """The text whose activations steered the rounding: what it was called, its tokens, and the digest of both it and
    the checkpoint.
    """

    text: str
    tokens: int
    digest: str


@dataclass(frozen=True)
class HeldOut:
    """What the bundle costs on text that calibration has not seen: KL(checkpoint || bundle) in nats per token, the
    share of positions with the same token most likely, and both perplexities. text: what it was called.
    """

    text: str
    tokens: int
    kld_mean: float
    top1_agreement: float
    perplexity: float
    checkpoint_perplexity: float

    @property
    def rise(self) -> float:
        """By how much the perplexity rose, relative to the checkpoint's."""
        return self.perplexity / self.checkpoint_perplexity - 1


@dataclass(frozen=True)
class Manifest:
    """Everything a client may want to know before it opens the artifact.

    options: how the exporter was asked to lay it out (its profile and the like).
    """

    format: str
    artifact: str
    source: Source
    architecture: dict[str, Any]
    context: int
    window: int | None
    stop_tokens: tuple[int, ...]
    chat: str | None
    quantization: dict[str, TensorQuant]
    files: tuple[BundleFile, ...]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    calibration: CalibratedOn | None = None
    parity: Parity | None = None
    quality: HeldOut | None = None
    version: int = VERSION

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


def list_files(folder: Path) -> tuple[BundleFile, ...]:
    """Every file of a bundle folder but the manifest, with size and digest."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and p.name != MANIFEST)
    return tuple(BundleFile(p.relative_to(folder).as_posix(), p.stat().st_size, sha256(p)) for p in paths)


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write `phi-bundle.json` into the bundle's folder."""
    write_file(folder / MANIFEST, json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")


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
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raise BundleError(f"{path}: is not valid JSON; export the bundle again") from None
    version = raw.get("version") if isinstance(raw, dict) else None
    if type(version) is not int or version < 1:
        raise BundleError(f"{path}: has no manifest version; export the bundle again")
    if version > VERSION:
        raise BundleError(f"{path}: manifest version {version} is newer than ours ({VERSION}); upgrade phi-edge")
    try:
        parity = raw["parity"]
        manifest = Manifest(
            format=_one_of(raw["format"], tuple(FORMATS)),
            artifact=_inside(raw["artifact"]),
            source=_source(raw["source"]),
            architecture=dict(raw["architecture"]),
            context=_count(raw["context"]),
            window=None if raw["window"] is None else _count(raw["window"]),
            stop_tokens=tuple(_count(t, 0) for t in raw["stop_tokens"]),
            chat=None if raw["chat"] is None else str(raw["chat"]),
            quantization={str(k): _quant(v) for k, v in _some(dict(raw["quantization"])).items()},
            files=tuple(
                BundleFile(_inside(f["path"]), _count(f["bytes"], 0), str(f["sha256"]))
                for f in _some(list(raw["files"]))
            ),
            options=_options(raw.get("options", {})),
            calibration=_calibration(raw.get("calibration")),
            parity=None if parity is None else _parity(parity),
            quality=_quality(raw.get("quality")),
            version=version,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise BundleError(f"{path}: is malformed ({type(e).__name__}: {e}); export the bundle again") from None
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


def _quant(raw: dict[str, Any]) -> TensorQuant:
    return TensorQuant(str(raw["type"]), _count(raw["block"]), _count(raw["weights"]), _count(raw["bytes"]))


def _source(raw: dict[str, Any]) -> Source:
    source = Source(**raw)
    texts = [source.name, *([] if source.revision is None else [source.revision])]
    digests = [part for item in source.sha256.items() for part in item]
    if not all(isinstance(t, str) for t in (*texts, *digests)) or not isinstance(source.random, bool):
        raise ValueError("source has fields of other types")
    return source


def _options(raw: dict[str, Any]) -> dict[str, Any]:
    known = {"profile": (str, type(None)), "context": (int, type(None)), "split_qkv": (bool,), "int8_kv": (bool,)}
    for name, value in dict(raw).items():
        if name not in known or type(value) not in known[name]:
            raise ValueError(f"option {name} is {value!r}")
    return dict(raw)


def _calibration(raw: dict[str, Any] | None) -> CalibratedOn | None:
    return None if raw is None else CalibratedOn(str(raw["text"]), _count(raw["tokens"]), str(raw["digest"]))


def _parity(raw: dict[str, Any]) -> Parity:
    errors = tuple(_real(e) for e in raw.get("layer_errors", ()))
    figures = {name: _real(value) for name, value in raw.items() if name not in ("tokens", "layer_errors")}
    return Parity(tokens=_count(raw["tokens"]), layer_errors=errors, **figures)


def _quality(raw: dict[str, Any] | None) -> HeldOut | None:
    if raw is None:
        return None
    figures = {name: _real(value) for name, value in raw.items() if name not in ("text", "tokens")}
    return HeldOut(text=str(raw["text"]), tokens=_count(raw["tokens"]), **figures)


def _real(value: Any) -> float:
    if type(value) not in (int, float) or not value >= 0:
        raise ValueError(f"{value!r} is not a number from 0 on")
    return float(value)


def _count(value: object, least: int = 1) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{value!r} is not a whole number from {least} on")
    return value


def _some(items: _Items) -> _Items:
    if not items:
        raise ValueError("a list that cannot be empty is")
    return items


def _one_of(value: object, known: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in known:
        raise ValueError(f"{value!r} is none of {', '.join(known)}")
    return value


def _inside(value: object) -> str:
    """A path that stays in the bundle, whatever wrote the manifest."""
    path = PurePosixPath(str(value))
    long = len(str(value)) > 1024 or any(len(part.encode()) > 255 for part in path.parts)  # than systems open
    if (
        not isinstance(value, str)
        or path.is_absolute()
        or ".." in path.parts
        or "\\" in value
        or not path.parts
        or long
    ):
        raise ValueError(f"path {value!r} leaves the bundle")
    return value
