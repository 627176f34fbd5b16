"""Core ML: an `.mlpackage` for iOS 18, its ML Program built directly (`coreml_graph`), its weights streamed.

Two profiles. gpu: signed integers with a float16 scale per block along a row. ane, for the Neural
Engine: palettes, one table per group of rows, in packages no larger than it loads. A budget brings
3- and 2-bit palettes into both.
"""

import json
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from phi_export.formats import (
    Calibrated,
    Quantization,
    TensorGroup,
    Type,
    choose_profile,
    more_bits,
    piece,
    tensor_groups,
)
from phi_export.formats.coreml.graph import CoreMLMatrix, PackagePart, build_model, kv_capacity, rope_rows
from phi_export.formats.coreml.lint import CHUNK_BYTES, MODEL, WEIGHTS, lint
from phi_export.formats.coreml.mil import BlobLayout
from phi_export.formats.parallel_writer import ParallelWriter, PlacedFile
from phi_export.quantize.gptq import HessianFactor
from phi_export.quantize.uniform import dequantize_rows, finite, fit_palettes, round_rows
from phi_runtime.architecture.checkpoint import Checkpoint
from phi_runtime.architecture.config import Config
from phi_runtime.architecture.decoder import F32, Decoder
from phi_runtime.backends import DEFAULT_CONTEXT
from phi_runtime.backends.coreml import package_paths
from phi_runtime.backends.mil.blob import BITS, BlobReader
from phi_runtime.backends.mil.schema import messages
from phi_runtime.backends.reference import ReadTensor, round_float16
from phi_runtime.errors import BundleError, UsageError
from phi_runtime.files import write_file
from phi_runtime.package.bits import pack
from phi_runtime.package.manifest import ExportOptions, Manifest, TensorQuant

PROFILES = ("gpu", "ane")
ENGINE = "coreml"
# Its activations keep 16 bits, and one palette for whole rows wants channels as they are.
HAS_INT8_KV = False
EQUALISED = False
OWN_FILES = ()
ROUNDING_MARGIN = 8  # float16 after every operation, not before the products alone
rounding = round_float16

INDEX = "phi-edge.weights"  # metadata key: where in the weight file each tensor of the checkpoint is


@dataclass(frozen=True)
class CoreMLGrid:
    """Signed integers with one float16 scale per block along a row."""

    name: str
    bits: int
    block: int
    error: float
    fed_back: float

    @property
    def multiple(self) -> int:
        """A row holds whole blocks."""
        return self.block

    def nbytes(self, rows: int, columns: int) -> int:
        """Codes and scales."""
        return rows * columns * self.bits // 8 + rows * columns // self.block * 2


@dataclass(frozen=True)
class Palette:
    """Codes into a table of float16 values, one table per group of rows."""

    name: str
    bits: int
    error: float
    fed_back: float
    block: int = 1
    multiple: int = 8  # of 3 and 6 bits, eight codes make whole bytes

    def nbytes(self, rows: int, columns: int) -> int:
        """Codes and tables."""
        return rows * columns * self.bits // 8 + rows // palette_rows(rows) * (1 << self.bits) * 2


_GRIDS: tuple[CoreMLGrid, ...] = (
    CoreMLGrid("int4-g32", 4, 32, 0.0068, 0.0077),
    CoreMLGrid("int4-g64", 4, 64, 0.0082, 0.0093),
    CoreMLGrid("int4-g128", 4, 128, 0.0095, 0.0107),
    CoreMLGrid("int8-g64", 8, 64, 0.00004, 0.00004),
    CoreMLGrid("int8-g128", 8, 128, 0.00004, 0.00005),
)
_PALETTES: tuple[Palette, ...] = (
    Palette("palette2", 2, 0.1175, 0.185),
    Palette("palette3", 3, 0.0345, 0.048),
    Palette("palette4", 4, 0.0095, 0.013),
    Palette("palette6", 6, 0.0007, 0.0008),
)
_BY_NAME: dict[str, CoreMLGrid | Palette] = {t.name: t for t in _GRIDS} | {t.name: t for t in _PALETTES}
_PROFILE_TYPES = {
    "gpu": (*(t.name for t in _GRIDS), "palette2", "palette3", "palette6"),
    "ane": [t.name for t in _PALETTES],
}


def palette_rows(rows: int) -> int:
    """Rows that share a table: 16, or the most below that divides them; all, where they are odd in number."""
    return next((g for g in (16, 8, 4) if rows % g == 0), rows)


def check(config: Config, options: ExportOptions) -> None:
    """Refuse options that are not ours."""
    choose_profile("coreml", PROFILES, options)
    if options.context is not None and not 2 <= options.context <= config.max_position_embeddings:
        raise UsageError(f"--context {options.context} is not from 2 to the model's {config.max_position_embeddings}")


def types(options: ExportOptions) -> dict[str, Type]:
    """The profile's types."""
    return {name: _BY_NAME[name] for name in _PROFILE_TYPES[choose_profile("coreml", PROFILES, options)]}


def yardstick(item: TensorGroup, layers: int, options: ExportOptions) -> str:
    """4 bits, in blocks of 32 as coremltools' have them, or palettes; and more where llama.cpp's Q4_K_M has 6."""
    if choose_profile("coreml", PROFILES, options) == "ane":
        return "palette6" if more_bits(item, layers) else "palette4"
    if more_bits(item, layers):
        return next((f"int8-g{b}" for b in (128, 64) if item.columns % b == 0), "palette6")
    return "int4-g32" if item.columns % 32 == 0 else "palette6"


def vector_bytes(options: ExportOptions) -> int:
    """Norms and biases are float32."""
    return 4


def context(config: Config, options: ExportOptions) -> int:
    """What was asked for, by default all of it up to 4,096: the cache has a fixed size."""
    return options.context or min(config.max_position_embeddings, DEFAULT_CONTEXT)


def overhead(checkpoint: Checkpoint, options: ExportOptions) -> int:
    """The program, its rotary tables, the heads of the weight file's entries."""
    d = checkpoint.config.decoder()
    rows = rope_rows(d, context(checkpoint.config, options))
    tables = 2 * 2 * rows * d.rope.dims // 2 if d.rope else 0
    return tables + 60_000 + 55_000 * len(d.layers) + 4 * kv_capacity(d, context(checkpoint.config, options)) * 2


def write(
    checkpoint: Checkpoint,
    plan: Quantization,
    options: ExportOptions,
    folder: Path,
    stream: ParallelWriter,
    calibrated: Calibrated,
) -> None:
    """Write the package, or the chain of packages: weights a tensor at a time, then each program."""
    d = checkpoint.config.decoder()
    found = tensor_groups(checkpoint.config, options)
    length = context(checkpoint.config, options)
    parts = split(d, plan, choose_profile("coreml", PROFILES, options))
    for n, part in enumerate(parts):
        package = folder / package_name(n, len(parts))
        data = package / "Data"
        (data / WEIGHTS).mkdir(parents=True, exist_ok=True)
        held = part.tensors()
        _write_package(checkpoint, part, plan, [i for i in found if i.tensor in held], length, data, stream, calibrated)
        write_file(package / "Manifest.json", json.dumps(_package_manifest(), indent=4, sort_keys=True) + "\n")


def artifact(folder: Path) -> str:
    """The package, or the first of the chain."""
    return min(p.name for p in folder.glob("model*.mlpackage"))


def package_name(n: int, count: int) -> str:
    """`model.mlpackage`, or `model-1-of-3.mlpackage` and so on."""
    return "model.mlpackage" if count == 1 else f"model-{n + 1}-of-{count}.mlpackage"


def split(decoder: Decoder, plan: Quantization, profile: str) -> list[PackagePart]:
    """The model in as few parts as the profile's limit of a file allows, of equal size as far as layers go."""
    limit = CHUNK_BYTES[profile]
    sizes = [sum(plan[t].bytes for t in _layer_tensors(decoder, n)) for n in range(len(decoder.layers))]
    embedding = plan[decoder.embedding].bytes + (plan[decoder.positions].bytes if decoder.positions else 0)
    head = plan[decoder.head.weight[0]].bytes
    total = embedding + sum(sizes) + head
    count = 1 if limit is None else -(-total // limit)
    while True:
        parts: list[PackagePart] = []
        start, filled = 0, embedding
        for n, size in enumerate(sizes):
            if filled + size / 2 > total * (len(parts) + 1) / count and n > start and len(parts) < count - 1:
                parts.append(PackagePart(decoder, start, n))
                start = n
            filled += size
        parts.append(PackagePart(decoder, start, len(sizes)))
        each = [sum(sizes[p.start : p.stop]) + embedding * p.first + head * p.last for p in parts]
        if limit is None or max(each) <= limit or count >= len(sizes):
            return parts
        count += 1


def _layer_tensors(decoder: Decoder, n: int) -> list[str]:
    return [t for linear in decoder.layers[n].linears() for t in linear.weight]


def _write_package(
    checkpoint: Checkpoint,
    part: PackagePart,
    plan: Quantization,
    found: list[TensorGroup],
    length: int,
    data: Path,
    stream: ParallelWriter,
    calibrated: Calibrated,
) -> None:
    layout = BlobLayout()
    places: dict[str, CoreMLMatrix] = {}
    for item in found:
        shape = checkpoint.tensors[item.tensor].shape
        kind = _BY_NAME.get(plan[item.name].type)
        if isinstance(kind, CoreMLGrid):
            codes = layout.add(f"int{kind.bits}", shape)
            places[item.tensor] = CoreMLMatrix(codes, layout.add("float16", (shape[0], shape[1] // kind.block)))
        elif isinstance(kind, Palette):
            codes = layout.add(f"uint{kind.bits}", shape)
            tables = (shape[0] // palette_rows(shape[0]), 1, 1 << kind.bits, 1)
            places[item.tensor] = CoreMLMatrix(codes, layout.add("float16", tables))
        else:
            places[item.tensor] = CoreMLMatrix(layout.add("float32", shape))
    rows = _rope(part.decoder, length)
    for name, table in rows.items():
        places[name] = CoreMLMatrix(layout.add("float16", table.shape))
    with stream.file(data / WEIGHTS / "weight.bin", layout.size) as file:
        layout.write_heads(file)
        for name, table in rows.items():
            file.write(places[name].codes.place, table)
        for item in found:
            # A tied embedding lies in the first and in the last package.
            name = f"{item.name}@{data.parent.name}" if item.tensor in part.shared else item.name
            if stream.missing(name):
                known = calibrated.factor(item.tensor)
                _write_item(file, places[item.tensor], checkpoint, item, plan[item.name], stream, known)
                stream.done(name)
    model = build_model(part, places, length)
    index = {
        name: [m.codes.dtype, m.codes.offset, None if m.table is None else m.table.offset, *m.codes.shape]
        for name, m in places.items()
    }
    model.description.metadata.userDefined[INDEX] = json.dumps(index)
    write_file(data / MODEL, model.SerializeToString(deterministic=True))


def _write_item(
    file: PlacedFile,
    place: CoreMLMatrix,
    checkpoint: Checkpoint,
    item: TensorGroup,
    quant: TensorQuant,
    stream: ParallelWriter,
    factor: HessianFactor | None,
) -> None:
    tensor, kind = checkpoint.tensors[item.tensor], _BY_NAME.get(quant.type)
    if kind is None:
        file.write(place.codes.place, finite(tensor))
        return
    assert place.table is not None
    codes_at, table_at = place.codes.place, place.table.place
    row_bytes = item.columns * kind.bits // 8
    work: Callable[[int, int], None]
    if isinstance(kind, CoreMLGrid):
        block, bits = kind.block, kind.bits

        def work(start: int, stop: int) -> None:
            codes, scales = round_rows(finite(tensor, start, stop), bits, block, factor)
            file.write(codes_at + start * row_bytes, pack(codes, bits))
            file.write(table_at + start * (item.columns // block) * 2, scales)

        stream.pieces(item.rows, item.columns, 1, work, piece(factor))
    else:
        group, size, width = palette_rows(item.rows), 2 << kind.bits, kind.bits

        def work(start: int, stop: int) -> None:
            codes, tables = fit_palettes(finite(tensor, start, stop), width, group, factor)
            file.write(codes_at + start * row_bytes, pack(codes, width))
            file.write(table_at + start // group * size, tables)

        stream.pieces(item.rows, item.columns, group, work, piece(factor))


def _rope(decoder: Decoder, length: int) -> dict[str, np.ndarray]:
    """cos and sin [rows, dims / 2] in float16; with LongRoPE the short table, then the long one."""
    if decoder.rope is None:
        return {}
    positions = np.arange(length)
    tables = [decoder.rope.tables(positions[: decoder.rope.original or length], 1)]
    if rope_rows(decoder, length) > len(tables[0][0]):
        tables.append(decoder.rope.tables(positions, decoder.rope.original + 1))
    return {name: np.concatenate([t[i] for t in tables]).astype(np.float16) for i, name in enumerate(("cos", "sin"))}


def rounded(x: F32, kind: str, options: ExportOptions) -> F32:
    """As Core ML materialises it."""
    chosen = _BY_NAME[kind]
    if isinstance(chosen, CoreMLGrid):
        return dequantize_rows(*round_rows(x, chosen.bits, chosen.block))
    group = palette_rows(len(x))
    codes, tables = fit_palettes(x, chosen.bits, group)
    values = np.repeat(tables.astype(np.float32), group, axis=0)
    return np.take_along_axis(values, codes.astype(np.int64), axis=1)


def validate(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> None:
    """Nothing in the packages is what a device would refuse."""
    refused = [f for f in lint(folder / manifest.artifact, manifest.options.profile or "gpu") if f.refused]
    if refused:
        raise BundleError(f"a device would refuse it: {refused[0].where}: {refused[0].what}")


def read(folder: Path, manifest: Manifest) -> ReadTensor:
    """Weights of the packages, at the places their own metadata names."""
    places: dict[str, tuple[BlobReader, list[Any]]] = {}
    for package in package_paths(folder / manifest.artifact):
        data = package / "Data"
        try:
            model = messages()["Model"]()
            model.ParseFromString((data / MODEL).read_bytes())
            index = json.loads(model.description.metadata.userDefined[INDEX])
            blob = BlobReader(data / WEIGHTS / "weight.bin")
            places |= {name: (blob, entry) for name, entry in index.items()}
        except BundleError:
            raise
        except Exception as e:  # missing files, protobuf's and JSON's errors alike
            raise BundleError(f"{package}: cannot be read ({e}); export the bundle again") from None

    def tensor(name: str, start: int = 0, stop: int | None = None) -> F32:
        blob, (dtype, offset, table, *shape) = places[name]
        count, rows = int(np.prod(shape)), int(shape[0])
        stop = rows if stop is None else min(stop, rows)
        if start >= stop:
            return np.zeros((0, *shape[1:]), np.float32)
        columns = count // rows
        codes = blob.read(offset, dtype, count, start * columns, stop * columns).reshape(stop - start, *shape[1:])
        if table is None:
            return codes.astype(np.float32)
        if dtype.startswith("uint"):
            group, size = palette_rows(rows), 1 << BITS[dtype]
            tables = blob.read(table, "float16", rows // group * size).astype(np.float32)
            first = (np.arange(start, stop, dtype=np.int32) // group * size)[:, None]
            looked_up: F32 = np.take(tables, first + codes)
            return looked_up
        block = _BY_NAME[manifest.quantization[name].type].block
        scales = blob.read(table, "float16", count // block, start * columns // block, stop * columns // block)
        out = codes.reshape(-1, block).astype(np.float32)
        out *= scales.astype(np.float32)[:, None]
        return out.reshape(codes.shape)

    return tensor


def _package_manifest() -> dict[str, Any]:
    """The package's own list of contents.

    Its identifiers are fixed, so that equal input gives equal bytes. Core ML's tools write the list
    back, sorted, when they open a package; written sorted, the bundle's digests survive that.
    """
    entries = {}
    identifiers = {path: str(uuid.uuid5(uuid.NAMESPACE_URL, path)).upper() for path in (MODEL, WEIGHTS)}
    for name, path, text in (("model.mlmodel", MODEL, "Specification"), ("weights", WEIGHTS, "Weights")):
        entries[identifiers[path]] = {
            "author": "com.apple.CoreML",
            "description": f"CoreML Model {text}",
            "name": name,
            "path": path,
        }
    return {
        "fileFormatVersion": "1.0.0",
        "itemInfoEntries": entries,
        "rootModelIdentifier": identifiers[MODEL],
    }
