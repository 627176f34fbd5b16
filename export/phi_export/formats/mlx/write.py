"""MLX: a Hugging Face folder whose matrices are MLX's affine types, as `mlx_lm.load` opens it.

A weight is scale * code + bias, codes of 2 to 8 bits, one float16 scale and bias per group of 32 or 64 along a row. The
types are mixed matrix by matrix; config.json lists each (mlx_lm: `quantization`). `model.safetensors` is laid out
before anything is written, so that its header is known and the weights are streamed into their places.
"""

import json
from dataclasses import dataclass, replace
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
from phi_export.formats.parallel_writer import ParallelWriter, PlacedFile
from phi_export.quantize.gptq import HessianFactor
from phi_export.quantize.uniform import F16, U8, finite, round_affine
from phi_runtime.architecture.checkpoint import Checkpoint, stop_tokens
from phi_runtime.architecture.config import Config, Phi3Config
from phi_runtime.architecture.decoder import F32
from phi_runtime.backends.mlx import WEIGHTS
from phi_runtime.backends.reference import ReadTensor, round_float16
from phi_runtime.errors import BundleError, UnsupportedError
from phi_runtime.files import write_file
from phi_runtime.package.bits import pack, unpack
from phi_runtime.package.manifest import ExportOptions, Manifest, TensorQuant

PROFILES = ("float16",)
ENGINE = "mlx"
HAS_INT8_KV = False
EQUALISED = False  # activations keep 16 bits
ROUNDING_MARGIN = 8  # float16 after every operation, not before the products alone
OWN_FILES = ("config.json",)
rounding = round_float16

_ARCHITECTURES = ("phi3", "phi")  # that mlx_lm computes as transformers does


@dataclass(frozen=True)
class Affine:
    """Codes, and a float16 scale and bias per group along a row."""

    bits: int
    block: int
    error: float
    fed_back: float

    @property
    def name(self) -> str:
        """By bits and group size."""
        return f"affine{self.bits}-g{self.block}"

    @property
    def multiple(self) -> int:
        """A row holds whole groups."""
        return self.block

    def nbytes(self, rows: int, columns: int) -> int:
        """Codes, scales and biases."""
        return rows * columns * self.bits // 8 + 4 * rows * columns // self.block


# Squared error of rounding normally distributed weights, by bits and group size.
_ERRORS = {
    (2, 32): 0.110, (2, 64): 0.123, (3, 32): 0.0257, (3, 64): 0.0308, (4, 32): 0.0059, (4, 64): 0.0076,
    (5, 32): 0.00139, (5, 64): 0.00181, (6, 32): 0.000336, (6, 64): 0.000442, (8, 32): 0.000022, (8, 64): 0.000028,
}  # fmt: skip
_FED_BACK = 1.13  # times as much while error feedback goes on, as of ONNX's grids
_TYPES = {kind.name: kind for kind in (Affine(*shape, e, _FED_BACK * e) for shape, e in _ERRORS.items())}


def check(config: Config, options: ExportOptions) -> None:
    """Refuse what mlx_lm computes otherwise."""
    choose_profile("mlx", PROFILES, options)
    if config.model_type not in _ARCHITECTURES:
        raise UnsupportedError(f"mlx: model_type {config.model_type!r} is not carried; use --format onnx,coreml")
    if isinstance(config, Phi3Config) and (scaling := config.rope_scaling) is not None:
        derived = replace(config, rope_scaling=replace(scaling, attention_factor=None))
        factors = [c.decoder().rope.attention_factor for c in (config, derived)]  # type: ignore[union-attr]
        if abs(factors[0] - factors[1]) > 1e-6:
            raise UnsupportedError(
                "mlx: mlx_lm has no place for an attention_factor in rope_scaling; use --format onnx,coreml"
            )


def artifact(folder: Path) -> str:
    """The file of weights."""
    return WEIGHTS


def types(options: ExportOptions) -> dict[str, Type]:
    """MLX's affine types of 2 to 8 bits."""
    return dict(_TYPES)


def yardstick(item: TensorGroup, layers: int, options: ExportOptions) -> str:
    """mlx_lm's own 4 bits in groups of 64, and 6 bits where llama.cpp's Q4_K_M has them."""
    return f"affine{6 if more_bits(item, layers) else 4}-g{64 if item.columns % 64 == 0 else 32}"


def vector_bytes(options: ExportOptions) -> int:
    """Norms and biases are float16."""
    return 2


def context(config: Config, options: ExportOptions) -> int:
    """mlx_lm has neither phi3's window nor, of LongRoPE, both lists of factors: a bundle ends before they matter."""
    d = config.decoder()
    most = d.window() or config.max_position_embeddings
    return min(most, d.rope.original) if d.rope is not None and d.rope.long else most


def overhead(checkpoint: Checkpoint, options: ExportOptions) -> int:
    """The header of the weights, and config.json."""
    count = len(tensor_groups(checkpoint.config, options))
    return count * (3 * 130 + 110) + 2 * len(json.dumps(checkpoint.config.to_json()))


@dataclass(frozen=True)
class _Place:
    offset: int
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


def _layout(config: Config, plan: Quantization, options: ExportOptions) -> tuple[bytes, dict[str, _Place]]:
    """The head of the file, up to the first weight, and the place of every tensor, from the file's start."""
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {}
    for item in tensor_groups(config, options):
        kind = _TYPES.get(plan[item.name].type)
        if kind is None:
            shapes[item.tensor] = "F16", config.tensor_shapes()[item.tensor]
            continue
        name = item.tensor.removesuffix(".weight")
        shapes[f"{name}.weight"] = "U32", (item.rows, item.columns * kind.bits // 32)
        shapes[f"{name}.scales"] = shapes[f"{name}.biases"] = "F16", (item.rows, item.columns // kind.block)
    # What is of 4 bytes comes first, so that everything is aligned to its size.
    ordered = sorted(shapes.items(), key=lambda entry: entry[1][0] != "U32")
    entries: dict[str, Any] = {"__metadata__": {"format": "mlx"}}
    places: dict[str, _Place] = {}
    at = 0
    for name, (dtype, shape) in ordered:
        size = int(np.prod(shape)) * (4 if dtype == "U32" else 2)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        places[name] = _Place(at, dtype, shape, size)
        at += size
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    head = len(header).to_bytes(8, "little") + header
    return head, {n: _Place(p.offset + len(head), p.dtype, p.shape, p.nbytes) for n, p in places.items()}


def _config(config: Config, plan: Quantization, stops: tuple[int, ...]) -> dict[str, Any]:
    """config.json as mlx_lm reads it."""
    raw = config.to_json()
    if isinstance(raw.get("rope_scaling"), dict):
        # mlx_lm takes the long factors at any length; within the original context the short ones hold.
        raw["rope_scaling"] = raw["rope_scaling"] | {"long_factor": raw["rope_scaling"]["short_factor"]}
    kinds = {
        name.removesuffix(".weight"): {"group_size": _TYPES[q.type].block, "bits": _TYPES[q.type].bits}
        for name, q in plan.items()
        if q.type in _TYPES
    }
    return raw | {"eos_token_id": list(stops), "quantization": {"group_size": 64, "bits": 4, **kinds}}


def write(
    checkpoint: Checkpoint,
    plan: Quantization,
    options: ExportOptions,
    folder: Path,
    stream: ParallelWriter,
    calibrated: Calibrated,
) -> None:
    """Write the weights, then config.json."""
    head, places = _layout(checkpoint.config, plan, options)
    size = max(p.offset + p.nbytes for p in places.values())
    with stream.file(folder / WEIGHTS, size) as file:
        file.write(0, head)
        for item in tensor_groups(checkpoint.config, options):
            if stream.missing(item.name):
                factor = calibrated.factor(item.tensor)
                _write_item(file, places, checkpoint, item, plan[item.name], stream, factor)
                stream.done(item.name)
    raw = _config(checkpoint.config, plan, stop_tokens(checkpoint))
    write_file(folder / "config.json", json.dumps(raw, indent=1) + "\n")


def _write_item(
    file: PlacedFile,
    places: dict[str, _Place],
    checkpoint: Checkpoint,
    item: TensorGroup,
    quant: TensorQuant,
    stream: ParallelWriter,
    factor: HessianFactor | None,
) -> None:
    tensor, kind = checkpoint.tensors[item.tensor], _TYPES.get(quant.type)
    if kind is None:
        file.write(places[item.tensor].offset, finite(tensor).astype(np.float16))
        return
    name = item.tensor.removesuffix(".weight")
    at = {part: places[f"{name}.{part}"].offset for part in ("weight", "scales", "biases")}

    def work(start: int, stop: int) -> None:
        codes, scales, biases = _round(finite(tensor, start, stop), kind, factor)
        for part, rows in (("weight", pack(codes, kind.bits)), ("scales", scales), ("biases", biases)):
            file.write(at[part] + start * rows[0].nbytes, rows)

    stream.pieces(item.rows, item.columns, 1, work, piece(factor))


def _round(x: F32, kind: Affine, factor: HessianFactor | None = None) -> tuple[U8, F16, F16]:
    """Codes, scales and biases of finite rows."""
    codes, scales, zeros = round_affine(x, kind.bits, kind.block, factor)
    return codes, scales, (-scales.astype(np.float32) * zeros).astype(np.float16)


def _dequantize(codes: U8, scales: F16, biases: F16) -> F32:
    """What MLX computes with, [rows, columns]."""
    out = codes.reshape(*scales.shape, codes.shape[1] // scales.shape[1]).astype(np.float32)
    out *= scales.astype(np.float32)[:, :, None]
    out += biases.astype(np.float32)[:, :, None]
    return out.reshape(codes.shape)


def rounded(x: F32, kind: str, options: ExportOptions) -> F32:
    """As MLX dequantises it."""
    return _dequantize(*_round(x, _TYPES[kind]))


def validate(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> None:
    """config.json is what follows from the checkpoint, and the file's header what follows from the types."""
    expected = _config(checkpoint.config, manifest.quantization, manifest.stop_tokens)
    try:
        said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise BundleError(f"{folder / 'config.json'}: cannot be read ({e}); export the bundle again") from None
    wrong = sorted(key for key in expected.keys() | said.keys() if expected.get(key) != said.get(key))
    if wrong:
        raise BundleError(f"{folder / 'config.json'}: its {wrong[0]} is not what the checkpoint has")
    others = sorted(p.name for p in folder.glob("model*.safetensors") if p.name != WEIGHTS)
    if others:
        raise BundleError(f"{folder / others[0]}: mlx_lm would read it along with the weights; take it out")


def read(folder: Path, manifest: Manifest) -> ReadTensor:
    """Weights of the file, dequantised, where its header is the one that the manifest implies."""
    path = folder / WEIGHTS
    head, places = _layout(manifest.config(), manifest.quantization, manifest.options)
    try:
        with open(path, "rb") as f:
            found = f.read(len(head))
        size = path.stat().st_size
    except OSError as e:
        raise BundleError(f"{path}: cannot be read ({e}); export the bundle again") from None
    if found != head or size != max(p.offset + p.nbytes for p in places.values()):
        raise BundleError(f"{path}: its header is not that of the manifest's types; export the bundle again")

    def stored(name: str, start: int, stop: int | None) -> np.ndarray:
        place = places[name]
        dtype = np.dtype("<u4" if place.dtype == "U32" else "<f2")
        mapped = np.memmap(path, dtype=dtype, mode="r", offset=place.offset, shape=place.shape)
        return np.ascontiguousarray(mapped[start:stop])

    def tensor(name: str, start: int = 0, stop: int | None = None) -> F32:
        kind = _TYPES.get(manifest.quantization[name].type)
        if kind is None:
            return stored(name, start, stop).astype(np.float32)
        own = name.removesuffix(".weight")
        words, scales, biases = (stored(f"{own}.{part}", start, stop) for part in ("weight", "scales", "biases"))
        if len(words) == 0:
            return np.zeros((0, scales.shape[1] * kind.block), np.float32)
        return _dequantize(unpack(words.view(np.uint8), kind.bits, False), scales, biases)

    return tensor
