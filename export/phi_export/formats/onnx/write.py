"""ONNX: a decoder that onnxruntime, onnxruntime-genai and optimum load (`onnx_graph`), its weights beside it.

Two profiles: fp32 activations, for x86, and fp16, for Arm and phones. Weights go to
`model.onnx.data`, a tensor at a time. Scales have the activations' type, as MatMulNBits demands, so
that a block of 256 costs the fp32 profile what one of 128 costs the other.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

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
from phi_export.formats.onnx.graph import ACTIVATIONS, OnnxMatrix, build_model, genai_config, rope_positions
from phi_export.formats.parallel_writer import ParallelWriter, PlacedFile, align
from phi_export.quantize.gptq import HessianFactor
from phi_export.quantize.uniform import F16, U8, finite, round_affine, round_rows
from phi_runtime.architecture.checkpoint import Checkpoint, Tensor, stop_tokens
from phi_runtime.architecture.config import Config
from phi_runtime.architecture.decoder import F32, Decoder
from phi_runtime.backends.onnxruntime import INT8_KV, WINDOWED
from phi_runtime.backends.reference import ReadTensor, round_int8
from phi_runtime.errors import BundleError, UnsupportedError
from phi_runtime.files import write_file
from phi_runtime.package.bits import pack, unpack
from phi_runtime.package.manifest import ExportOptions, Manifest, TensorQuant
from phi_train.grid import BLOCKS, block_of

ARTIFACT = "model.onnx"
DATA = "model.onnx.data"
PROFILES = ("fp32", "fp16")
ENGINE = "onnxruntime"
EQUALISED = True
HAS_INT8_KV = True
OWN_FILES = ()
ROUNDING_MARGIN = 2

_ALIGN = 64
_HEADROOM = 1.1  # of a cache of 8 bits, for magnitudes beyond those of the calibration text


@dataclass(frozen=True)
class OnnxGrid:
    """Unsigned codes and a scale per block along a row; the zero point is half their range, or stored (`affine`)."""

    name: str
    bits: int
    block: int
    scale_bytes: int
    error: float
    fed_back: float
    affine: bool = False

    @property
    def multiple(self) -> int:
        """A row holds whole blocks."""
        return self.block

    def nbytes(self, rows: int, columns: int) -> int:
        """Codes, scales and zero points."""
        zeros = rows * self.zeros_bytes(columns) if self.affine else 0
        return rows * columns * self.bits // 8 + rows * columns // self.block * self.scale_bytes + zeros

    def zeros_bytes(self, columns: int) -> int:
        """Of a row's zero points, which are as wide as codes and packed as they are."""
        return -(-(columns // self.block) * self.bits // 8)


# Bits and block of each type, and its errors; 2 bits with other blocks take onnxruntime's slow path. `uint4` types have
# zero points.
_ERRORS = {
    (2, 64): (0.127, 0.144), (2, 128): (0.137, 0.154),
    (4, 16): (0.0052, 0.0060), (4, 32): (0.0068, 0.0077), (4, 64): (0.0082, 0.0093), (4, 128): (0.0095, 0.0107),
    (4, 256): (0.0104, 0.0119),
    (8, 64): (0.00004, 0.00004), (8, 128): (0.00004, 0.00005),
}  # fmt: skip
_AFFINE_ERRORS = {16: (0.0043, 0.0049), 32: (0.0059, 0.0067), 64: (0.0075, 0.0085), 128: (0.0089, 0.0101)}


def check(config: Config, options: ExportOptions) -> None:
    """Refuse what onnxruntime's attention cannot do."""
    choose_profile("onnx", PROFILES, options)
    d = config.decoder()
    if d.head_dim % 8 or (d.rope is not None and (d.head_dim % 16 or d.rope.dims % 16)):
        raise UnsupportedError(
            f"onnx: onnxruntime's attention wants heads, and their rotated part, of multiples of 16 "
            f"(8 without rotation), not {d.head_dim}; use --format coreml"
        )


def artifact(folder: Path) -> str:
    """The graph."""
    return ARTIFACT


def types(options: ExportOptions) -> dict[str, Type]:
    """MatMulNBits' grids."""
    return dict(_grids(options))


def _grids(options: ExportOptions) -> dict[str, OnnxGrid]:
    width = vector_bytes(options)
    symmetric = [OnnxGrid(f"int{b}-g{g}", b, g, width, *errors) for (b, g), errors in _ERRORS.items()]
    affine = [OnnxGrid(f"uint4-g{g}", 4, g, width, *errors, affine=True) for g, errors in _AFFINE_ERRORS.items()]
    return {grid.name: grid for grid in (*symmetric, *affine)}


def rounding(x: F32) -> F32:
    """onnxruntime rounds activations in blocks as wide as the weights' own: the widest that such rows divide into."""
    return round_int8(x, block_of(x.shape[-1], max(BLOCKS)) or 16)


def yardstick(item: TensorGroup, layers: int, options: ExportOptions) -> str:
    """Blocks of 32, as onnxruntime-genai's int4 has them, and 8 bits where llama.cpp's Q4_K_M has 6."""
    if more_bits(item, layers):
        return next((f"int8-g{b}" for b in (128, 64) if item.columns % b == 0), "int4-g16")
    return "int4-g32" if item.columns % 32 == 0 else "int4-g16"


def vector_bytes(options: ExportOptions) -> int:
    """Norms, biases and scales have the activations' type."""
    return 4 if choose_profile("onnx", PROFILES, options) == "fp32" else 2


def context(config: Config, options: ExportOptions) -> int:
    """All of it: GroupQueryAttention applies the window."""
    return config.max_position_embeddings


def overhead(checkpoint: Checkpoint, options: ExportOptions) -> int:
    """Rotary tables, the graph, genai's configuration, padding."""
    d = checkpoint.config.decoder()
    rows = sum(count for count, _ in rope_positions(d)) if d.rope else 0
    tables = rows * d.rope.dims * vector_bytes(options) if d.rope else 0  # cos and sin of half the dims
    graphs = 1 if d.kv_positions() is None else 2
    scales = options.int8_kv * 8 * len(d.layers) * d.kv_size
    return tables + scales + (graphs + options.int8_kv) * (20_000 + 14_000 * len(d.layers))


@dataclass(frozen=True)
class _Place:
    offset: int
    dtype: ir.DataType
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape)) * int(self.dtype.itemsize)


class _Layout:
    """Places in the data file, known before anything is written."""

    def __init__(self) -> None:
        self.places: dict[str, _Place] = {}
        self.size = 0

    def add(self, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> _Place:
        place = self.places[name] = _Place(align(self.size, _ALIGN), dtype, shape)
        self.size = place.offset + place.nbytes
        return place


def write(
    checkpoint: Checkpoint,
    plan: Quantization,
    options: ExportOptions,
    folder: Path,
    stream: ParallelWriter,
    calibrated: Calibrated,
) -> None:
    """Write the data file, then `model.onnx` and what genai wants beside it."""
    d = checkpoint.config.decoder()
    real = ACTIVATIONS[choose_profile("onnx", PROFILES, options)]
    kinds = types(options)
    found = tensor_groups(checkpoint.config, options)
    layout = _Layout()
    matrices: dict[str, OnnxMatrix] = {}
    for item in found:
        kind = kinds.get(plan[item.name].type)
        if not isinstance(kind, OnnxGrid):
            layout.add(item.tensor, real, checkpoint.tensors[item.tensor].shape)
            continue
        blocks = item.columns // kind.block
        matrices[item.tensor] = OnnxMatrix(kind.bits, kind.block, kind.affine)
        layout.add(f"{item.tensor}.codes", ir.DataType.UINT8, (item.rows, blocks, kind.block * kind.bits // 8))
        layout.add(f"{item.tensor}.scales", real, (item.rows, blocks))
        if kind.affine:
            layout.add(f"{item.tensor}.zeros", ir.DataType.UINT8, (item.rows, kind.zeros_bytes(item.columns)))
    tables = _rope_tables(d, options)
    for name, table in tables.items():
        layout.add(name, real, table.shape)
    with stream.file(folder / DATA, layout.size) as file:
        for name, table in tables.items():
            file.write(layout.places[name].offset, table)
        for item in found:
            if stream.missing(item.name):
                tensor, known = checkpoint.tensors[item.tensor], calibrated.factor(item.tensor)
                _write_item(file, layout, tensor, item, plan[item.name], options, stream, known)
                stream.done(item.name)
    initializers = [_external(name, p, folder) for name, p in layout.places.items()]
    codes = layout.places[f"{d.embedding}.codes"]
    # The same bytes once more, in the shape in which rows are looked up.
    flat = _Place(codes.offset, codes.dtype, (codes.shape[0], codes.shape[1] * codes.shape[2]))
    initializers.append(_external(f"{d.embedding}.rows", flat, folder))
    ir.save(build_model(d, matrices, initializers, real), folder / ARTIFACT)
    if d.kv_positions() is not None:
        ir.save(build_model(d, matrices, initializers, real, windowed=True), folder / WINDOWED)
    if options.int8_kv:
        scales = [peaks * np.float32(_HEADROOM / 127) for peaks in calibrated.kv_peaks()]
        ir.save(build_model(d, matrices, initializers, real, kv_scales=scales), folder / INT8_KV)
    settings = genai_config(checkpoint.config, stop_tokens(checkpoint), ARTIFACT)
    write_file(folder / "genai_config.json", json.dumps(settings, indent=1) + "\n")


def _external(name: str, place: _Place, folder: Path) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        DATA, place.offset, place.nbytes, place.dtype, shape=ir.Shape(place.shape), name=name, base_dir=folder
    )


def _write_item(
    file: PlacedFile,
    layout: _Layout,
    tensor: Tensor,
    item: TensorGroup,
    quant: TensorQuant,
    options: ExportOptions,
    stream: ParallelWriter,
    factor: HessianFactor | None,
) -> None:
    kind = types(options).get(quant.type)
    real = np.float32 if vector_bytes(options) == 4 else np.float16
    if not isinstance(kind, OnnxGrid):
        file.write(layout.places[item.tensor].offset, finite(tensor).astype(real))
        return
    at = {part: layout.places[f"{item.tensor}.{part}"].offset for part in ("codes", "scales")}
    if kind.affine:
        at["zeros"] = layout.places[f"{item.tensor}.zeros"].offset

    def work(start: int, stop: int) -> None:
        codes, scales, zeros = _round(finite(tensor, start, stop), kind, factor)
        parts = {"codes": pack(codes, kind.bits), "scales": scales.astype(real)}
        if kind.affine:
            parts["zeros"] = _pack_zeros(zeros, kind.bits)
        for part, rows in parts.items():
            file.write(at[part] + start * rows[0].nbytes, rows)

    stream.pieces(item.rows, item.columns, 1, work, piece(factor))


def _round(x: F32, kind: OnnxGrid, factor: HessianFactor | None = None) -> tuple[U8, F16, U8]:
    """Unsigned codes, scales and zero points of finite rows."""
    if kind.affine:
        return round_affine(x, kind.bits, kind.block, factor)
    codes, scales = round_rows(x, kind.bits, kind.block, factor)
    half = np.uint8(1 << kind.bits - 1)
    return codes.view(np.uint8) + half, scales, np.full(scales.shape, half)


def _dequantize(codes: U8, scales: np.ndarray, zeros: U8) -> F32:
    """What MatMulNBits computes with, [rows, columns]."""
    out = codes.reshape(*scales.shape, -1).astype(np.float32)
    out -= zeros.astype(np.float32)[:, :, None]
    out *= scales.astype(np.float32)[:, :, None]
    return out.reshape(len(scales), -1)


def _pack_zeros(zeros: np.ndarray, bits: int) -> np.ndarray:
    """Rows of zero points, each row in whole bytes."""
    each = 8 // bits
    return pack(np.pad(zeros, ((0, 0), (0, -zeros.shape[1] % each))), bits)


def _rope_tables(d: Decoder, options: ExportOptions) -> dict[str, np.ndarray]:
    if d.rope is None:
        return {}
    real = np.float32 if vector_bytes(options) == 4 else np.float16
    tables = [d.rope.tables(np.arange(count), length) for count, length in rope_positions(d)]
    return {
        name: np.concatenate([t[i] for t in tables]).astype(real) for i, name in enumerate(("cos_cache", "sin_cache"))
    }


def rounded(x: F32, kind: str, options: ExportOptions) -> F32:
    """As MatMulNBits dequantises it."""
    return _dequantize(*_round(x, _grids(options)[kind]))


def validate(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> None:
    """genai's configuration follows from the checkpoint; the graphs for a cache of the window's size and for one of
    8 bits are the other one but for what says so.
    """
    settings = json.dumps(genai_config(checkpoint.config, stop_tokens(checkpoint), ARTIFACT), indent=1) + "\n"
    path = folder / "genai_config.json"
    if not path.is_file() or path.read_text(encoding="utf-8") != settings:
        raise BundleError(f"{path}: is not what follows from the checkpoint; export the bundle again")
    plain = _load(folder / manifest.artifact)
    if manifest.config().decoder().kv_positions() is not None:
        path = folder / WINDOWED
        windowed = _load(path)
        for node in windowed.graph:
            if node.op_type == "GroupQueryAttention" and "sliding_window_cache" in node.attributes:
                del node.attributes["sliding_window_cache"]
        if _bytes(plain) != _bytes(windowed):
            raise BundleError(f"{path}: is not {manifest.artifact} with a windowed cache; export the bundle again")
    if manifest.options.int8_kv:
        path = folder / INT8_KV
        if _bytes(plain) != _bytes(_without_scales(_load(path), plain)):
            raise BundleError(f"{path}: is not {manifest.artifact} with a cache of 8 bits; export the bundle again")


def _load(path: Path) -> ir.Model:
    try:
        return ir.load(path)
    except Exception as e:  # whatever protobuf and onnx-ir meet
        raise BundleError(f"{path}: cannot be read ({e}); export the bundle again") from None


def _bytes(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString())


def _without_scales(model: ir.Model, plain: ir.Model) -> ir.Model:
    """A model whose cache is of 8 bits, with the cache of the plain one."""
    graph = model.graph
    for node in graph:
        if node.op_type == "GroupQueryAttention":
            for name in ("k_quant_type", "v_quant_type", "kv_cache_bit_width"):
                node.attributes.pop(name, None)
            inputs = [
                v for v in node.inputs if v is None or not (v.name or "").startswith(("key_scale.", "value_scale."))
            ]
            while inputs[-1] is None:
                inputs.pop()
            node.resize_inputs(len(inputs))
    for name in [n for n in graph.initializers if n.startswith(("key_scale.", "value_scale."))]:
        del graph.initializers[name]
    for ours, theirs in zip([*graph.inputs, *graph.outputs], [*plain.graph.inputs, *plain.graph.outputs], strict=True):
        ours.type = theirs.type
    return model


def read(folder: Path, manifest: Manifest) -> ReadTensor:
    """Weights of the bundle, from the initializers of the saved graph."""
    path = folder / manifest.artifact
    try:
        graph = ir.load(path).graph
    except Exception as e:  # whatever protobuf and onnx-ir meet
        raise BundleError(f"{path}: cannot be read ({e}); export the bundle again") from None

    kinds = _grids(manifest.options)

    def initializer(name: str, start: int, stop: int | None) -> np.ndarray:
        """Rows of an initializer, read and not mapped, so that they do not stay in memory."""
        value = graph.initializers.get(name)
        if value is None or value.const_value is None:
            raise BundleError(f"{path}: initializer {name} is missing; export the bundle again")
        t: Any = value.const_value
        if not isinstance(t, ir.ExternalTensor):
            return np.asarray(t.numpy()[start:stop])
        if Path(t.location).name != str(t.location) or t.offset is None:
            raise BundleError(f"{path}: {name} lies outside the bundle")
        shape, dtype = t.shape.numpy(), np.dtype(t.dtype.numpy())
        start, stop = min(start, shape[0]), shape[0] if stop is None else min(stop, shape[0])
        row = math.prod(shape[1:])
        count = max(0, stop - start) * row
        raw = np.fromfile(folder / str(t.location), dtype, count, offset=t.offset + start * row * dtype.itemsize)
        return raw.reshape(-1, *shape[1:])

    def tensor(name: str, start: int = 0, stop: int | None = None) -> F32:
        if f"{name}.scales" not in graph.initializers:
            return initializer(name, start, stop).astype(np.float32)
        looked_up = f"{name}.codes" not in graph.initializers  # an embedding that is no head
        codes = initializer(f"{name}.rows" if looked_up else f"{name}.codes", start, stop)
        scales = initializer(f"{name}.scales", start, stop)
        if not len(codes):
            return np.zeros((0, 0), np.float32)
        stored = np.ascontiguousarray(codes).reshape(*scales.shape, -1)
        kind = kinds[manifest.quantization[name].type]
        zeros = np.full(scales.shape, np.uint8(1 << kind.bits - 1))
        if kind.affine:
            packed = np.ascontiguousarray(initializer(f"{name}.zeros", start, stop))
            zeros = unpack(packed, kind.bits, False)[:, : scales.shape[1]]
        return _dequantize(unpack(stored, kind.bits, False), scales, zeros)

    return tensor
