"""What a model's files are, whatever engine they are for."""

import hashlib
import json
import struct
from pathlib import Path

from phi_bench.adapters import folder_config
from phi_bench.records import Model
from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.architecture.config import num_parameters
from phi_runtime.backends.record import kv_numbers
from phi_runtime.errors import BenchmarkError, BundleError, NotFoundError, PhiError
from phi_runtime.files import sha256
from phi_runtime.package.gguf_header import TYPE_SIZES, read_header
from phi_runtime.package.manifest import MANIFEST, Manifest
from phi_runtime.package.open import Package, open_package


def files(path: Path) -> list[Path]:
    """The files that a model consists of; of a folder all but hidden ones and those of a manifest or of training."""
    if path.is_file():
        return [path]
    found = sorted(
        p
        for p in path.rglob("*")
        if p.is_file()
        and p.name != MANIFEST
        and not {"training", "calibration"} & set(p.relative_to(path).parts)
        and not any(part.startswith(".") for part in p.relative_to(path).parts)
    )
    if not found:
        raise BenchmarkError(f"{path}: holds no files; give a model")
    return found


def describe(path: Path, name: str) -> Model:
    """Bytes, digest and weights of a model. Raises NotFoundError, BenchmarkError."""
    if not path.exists():
        raise NotFoundError(f"{path}: no such file or folder; give a bundle, a GGUF file or a model folder")
    found = files(path)
    size = sum(p.stat().st_size for p in found)
    try:
        package: Package | None = open_package(path)
    except PhiError:
        package = None
    if package is not None and package.manifest is not None:
        return _bundle(package, package.manifest, path, name)
    digest = sha256(path) if path.is_file() else folder_digest(path)
    if package is not None and package.format == "gguf":
        return _gguf(package, name, size, digest)
    if package is not None:
        return Model(name, "genai", size, digest, kv_numbers=kv_numbers(package))
    return _checkpoint(path, name, size, digest)


def _bundle(package: Package, manifest: Manifest, path: Path, name: str) -> Model:
    decoder = manifest.config().decoder()
    looked_up = () if decoder.tied else (decoder.embedding,)
    folder = path if path.is_dir() else path.parent
    for f in manifest.files:
        if not (folder / f.path).is_file() or sha256(folder / f.path) != f.sha256:
            raise BundleError(f"{folder / f.path}: is not the file that the manifest lists; export the bundle again")
    listed = "".join(f"{f.sha256} {f.path}\n" for f in manifest.files)
    return Model(
        name=name,
        format=manifest.format,
        file_bytes=manifest.file_bytes(),
        sha256=hashlib.sha256(listed.encode()).hexdigest(),
        parameters=num_parameters(manifest.config()),
        bits_per_weight=manifest.bits_per_weight(),
        read_bytes=sum(q.bytes for n, q in manifest.quantization.items() if n not in looked_up),
        kv_numbers=kv_numbers(package),
        random_weights=manifest.source.random,
    )


def _gguf(package: Package, name: str, size: int, digest: str) -> Model:
    header = read_header(package.path)
    looked_up = ("token_embd.weight",) if "output.weight" in header.tensors else ()
    blocks = {t: TYPE_SIZES[kind] for t, kind in header.types.items()}  # weights and bytes of each
    weights = sum(n // blocks[t][1] * blocks[t][0] for t, n in header.tensors.items())
    return Model(
        name=name,
        format="gguf",
        file_bytes=size,
        sha256=digest,
        parameters=weights,
        bits_per_weight=8 * sum(header.tensors.values()) / weights,
        read_bytes=sum(n for t, n in header.tensors.items() if t not in looked_up),
        kv_numbers=kv_numbers(package),
    )


def _checkpoint(path: Path, name: str, size: int, digest: str) -> Model:
    """A Hugging Face folder, or what else holds safetensors."""
    try:
        checkpoint = open_checkpoint(path)
    except PhiError:
        stored = [n for p in path.glob("*.safetensors") for n in _safetensors_bytes(p)]
        return Model(
            name,
            "mlx" if "quantization" in folder_config(path) else "folder",
            size,
            digest,
            read_bytes=sum(stored) or None,
        )
    decoder = checkpoint.config.decoder()
    shape = decoder.cache_shape()
    stored_bytes = {n: t.nbytes for n, t in checkpoint.tensors.items()}
    looked_up = () if decoder.tied else (decoder.embedding,)
    return Model(
        name=name,
        format="checkpoint",
        file_bytes=size,
        sha256=digest,
        parameters=num_parameters(checkpoint.config),
        bits_per_weight=8 * sum(stored_bytes.values()) / num_parameters(checkpoint.config),
        read_bytes=sum(n for t, n in stored_bytes.items() if t not in looked_up),
        kv_numbers=2 * shape.layers * shape.kv_heads * shape.head_dim,
    )


def _safetensors_bytes(path: Path) -> list[int]:
    """Bytes of each tensor, by the file's header."""
    try:
        with open(path, "rb") as f:
            (length,) = struct.unpack("<Q", f.read(8))
            header = json.loads(f.read(min(length, 100_000_000)))
        spans = [t["data_offsets"] for n, t in header.items() if n != "__metadata__"]
        return [int(end) - int(start) for start, end in spans]
    except (OSError, ValueError, struct.error, KeyError, TypeError, AttributeError):
        return []


def folder_digest(path: Path) -> str:
    """Of the names and digests of a folder's files."""
    listed = "".join(f"{sha256(p)} {p.relative_to(path).as_posix()}\n" for p in files(path))
    return hashlib.sha256(listed.encode()).hexdigest()
