"""GGUF, version 3: one file that stock llama.cpp and Ollama load.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. Metadata keys and tensor names
are those that llama.cpp's `phi3` and `phi2` architectures read.
"""

import struct
from dataclasses import dataclass
from pathlib import Path

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
from phi_export.formats.gguf.tokenizer import tokenizer_metadata
from phi_export.formats.gguf.values import Kind, Metadata, encode, encode_string
from phi_export.formats.parallel_writer import ParallelWriter, PlacedFile, align
from phi_export.quantize import ggml
from phi_export.quantize.ggml import GgmlType
from phi_export.quantize.ggml_codes import LAYOUTS, open_rows, put_codes
from phi_export.quantize.gptq import HessianFactor, round_columns
from phi_export.quantize.q4 import quantize_q4_0, quantize_q4_k
from phi_export.quantize.uniform import finite
from phi_runtime.architecture.checkpoint import Checkpoint
from phi_runtime.architecture.config import Config
from phi_runtime.architecture.decoder import F32
from phi_runtime.backends.reference import ReadTensor, round_int8
from phi_runtime.errors import BundleError, MissingExtraError, UnsupportedError
from phi_runtime.package.manifest import ExportOptions, Manifest, TensorQuant

ARTIFACT = "model.gguf"
PROFILES = ("cpu",)
ENGINE = "llama.cpp"
EQUALISED = True
HAS_INT8_KV = False
OWN_FILES = ()
ROUNDING_MARGIN = 2

_ALIGN = 32
_F32 = 0  # ggml_type
_ARCHITECTURES = {"phi3": "phi3", "phi": "phi2"}


@dataclass(frozen=True)
class _Type(GgmlType):
    """A ggml type, its measured errors, and the llama_ftype that a file mostly of it has."""

    error: float
    fed_back: float
    file_type: int

    @property
    def multiple(self) -> int:
        """A row holds whole blocks."""
        return self.block

    def nbytes(self, rows: int, columns: int) -> int:
        """Stored bytes of a matrix."""
        return rows * columns // self.block * self.block_bytes


_TYPES = {
    t.name: t
    for t in (
        _Type("Q2_K", 10, 256, 84, "q2_K", 0.0881, 0.0891, 10),
        _Type("Q3_K", 11, 256, 110, "q3_K", 0.0227, 0.0242, 12),
        _Type("Q4_0", 2, 32, 18, "q4_0", 0.0068, 0.0076, 2),
        _Type("IQ4_NL", 20, 32, 18, "iq4_nl", 0.0058, 0.0062, 25),
        _Type("Q4_1", 3, 32, 20, "q4_1", 0.0061, 0.0055, 3),
        _Type("Q5_0", 6, 32, 22, "q5_0", 0.0018, 0.0019, 8),
        _Type("Q5_1", 7, 32, 24, "q5_1", 0.0014, 0.0013, 9),
        _Type("Q4_K", 12, 256, 144, "q4_K", 0.0054, 0.0056, 15),
        _Type("Q5_K", 13, 256, 176, "q5_K", 0.0013, 0.0014, 17),
        _Type("Q6_K", 14, 256, 210, "q6_K", 0.00031, 0.00035, 18),
        _Type("Q8_0", 8, 32, 34, "q8_0", 0.00003, 0.00003, 7),
    )
}


def rounding(x: F32) -> F32:
    """llama.cpp rounds activations in blocks as wide as the weights': 256 for the K types, which every such row has."""
    return round_int8(x, 256 if x.shape[-1] % 256 == 0 else 32)


_LINEARS = {"o": "attn_output", "up": "ffn_up", "down": "ffn_down"}
_PARTS = ("attn_q", "attn_k", "attn_v")


def check(config: Config, options: ExportOptions) -> None:
    """Refuse what llama.cpp has no architecture for."""
    choose_profile("gguf", PROFILES, options)
    if config.model_type not in _ARCHITECTURES:
        raise UnsupportedError(
            f"gguf: llama.cpp has no architecture for model_type {config.model_type!r}; use --format onnx,coreml"
        )


def artifact(folder: Path) -> str:
    """The file."""
    return ARTIFACT


def types(options: ExportOptions) -> dict[str, Type]:
    """ggml's types, in order of size."""
    return dict(_TYPES)


def yardstick(item: TensorGroup, layers: int, options: ExportOptions) -> str:
    """llama.cpp's Q4_K_M; for rows that do not divide into blocks of 256, what it takes instead."""
    kind = "Q6_K" if more_bits(item, layers) else "Q5_K" if item.role == "qkv" else "Q4_K"
    return kind if item.columns % 256 == 0 else {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}[kind]


def vector_bytes(options: ExportOptions) -> int:
    """Norms and biases are float32."""
    return 4


def context(config: Config, options: ExportOptions) -> int:
    """Stock llama.cpp does not apply phi3's window, so a bundle ends where it would begin to matter."""
    return config.decoder().window() or config.max_position_embeddings


def overhead(checkpoint: Checkpoint, options: ExportOptions) -> int:
    """Metadata, tokenizer, the table of tensors, padding."""
    c = checkpoint.config
    metadata = _architecture(c, 0) | tokenizer_metadata(checkpoint, checkpoint.folder.resolve().name)
    size = sum(len(encode_string(k)) + 4 + len(encode(kind, value)) for k, (kind, value) in metadata.items())
    return size + 160 * (len(tensor_groups(c, options)) + 3)


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its GGUF name, ggml type, dimensions, place, and where its content comes from."""

    name: str
    ggml_type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int
    item: TensorGroup | None
    quant: TensorQuant | None
    content: F32 | None = None


def write(
    checkpoint: Checkpoint,
    plan: Quantization,
    options: ExportOptions,
    folder: Path,
    stream: ParallelWriter,
    calibrated: Calibrated,
) -> None:
    """Write `model.gguf`."""
    c = checkpoint.config
    entries = _entries(c, plan, options)
    head = head_of(checkpoint, entries, _mostly(plan), checkpoint.folder.resolve().name)
    base = len(head)
    with stream.file(folder / ARTIFACT, base + align(entries[-1].offset + entries[-1].nbytes, _ALIGN)) as file:
        file.write(0, head)
        for entry in entries:
            place = base + entry.offset
            if entry.item is None:
                assert entry.content is not None
                file.write(place, entry.content)
            elif stream.missing(entry.item.name):
                _write_item(file, place, checkpoint, entry, stream, calibrated.factor(entry.item.tensor))
                stream.done(entry.item.name)


def _write_item(
    file: PlacedFile,
    place: int,
    checkpoint: Checkpoint,
    entry: Entry,
    stream: ParallelWriter,
    factor: HessianFactor | None,
) -> None:
    item, tensor = entry.item, checkpoint.tensors[entry.item.tensor]  # type: ignore[union-attr]
    assert item is not None and entry.quant is not None
    if item.role == "vector":
        file.write(place, finite(tensor).astype("<f4"))
        return
    kind = _TYPES[entry.quant.type]
    row_bytes = entry.nbytes // item.rows

    def work(start: int, stop: int) -> None:
        rows = finite(tensor, item.start + start, item.start + stop)
        file.write(place + start * row_bytes, _quantize(rows, kind, factor))

    stream.pieces(item.rows, item.columns, 1, work, piece(factor))


# Without calibration, ggml's own quantisers for all but these two.
_OURS = {"Q4_0": quantize_q4_0, "Q4_K": quantize_q4_k}


def _quantize(rows: F32, kind: GgmlType, factor: HessianFactor | None) -> np.ndarray:
    importance = None if factor is None else factor.importance
    if kind.name in _OURS and importance is None:
        data = _OURS[kind.name](rows)
    else:
        data = ggml.quantize(rows, kind, importance)
    if factor is None:
        return data
    # Steps that fit the columns that matter, and other codes under them.
    layout = LAYOUTS[kind.name]
    put_codes(data, round_columns(rows, factor, layout.level(*open_rows(data, kind))), kind)
    return data


def rounded(x: F32, kind: str, options: ExportOptions) -> F32:
    """As llama.cpp dequantises it."""
    return ggml.dequantize(_quantize(x, _TYPES[kind], None), _TYPES[kind])


def validate(folder: Path, manifest: Manifest, checkpoint: Checkpoint) -> None:
    """All metadata, the tokenizer included, and the table of tensors are what follows from the checkpoint."""
    path = folder / manifest.artifact
    config, options = checkpoint.config, manifest.options
    entries = _entries(config, manifest.quantization, options)
    file_type = _mostly(manifest.quantization)
    try:
        import gguf

        name = str(gguf.GGUFReader(path).fields["general.name"].contents())
    except ImportError:
        raise MissingExtraError("gguf", "export") from None
    except Exception as e:  # the library raises whatever its parsing meets
        raise BundleError(f"{path}: cannot be read ({e}); export the bundle again") from None
    expected = head_of(checkpoint, entries, file_type, name)
    with open(path, "rb") as f:
        if f.read(len(expected)) != expected:
            raise BundleError(f"{path}: its metadata or tokenizer are not the checkpoint's; export the bundle again")


def _mostly(plan: Quantization) -> int:
    """The llama_ftype of the type that most weights have."""
    weights: dict[str, int] = {}
    for quant in plan.values():
        weights[quant.type] = weights.get(quant.type, 0) + quant.weights
    return _TYPES[max((t for t in weights if t in _TYPES), key=lambda t: weights[t])].file_type


@dataclass(frozen=True)
class _Stored:
    """A tensor as it lies in a file."""

    ggml_type: int
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def read(folder: Path, manifest: Manifest) -> ReadTensor:
    """Weights of the file, laid open by the `gguf` package: a second opinion on our own layout."""
    try:
        import gguf
    except ImportError:
        raise MissingExtraError("gguf", "export") from None
    path = folder / manifest.artifact
    try:
        reader = gguf.GGUFReader(path)
    except Exception as e:  # the library raises whatever its parsing meets
        raise BundleError(f"{path}: cannot be read ({e}); export the bundle again") from None
    # Its places are kept and its mapping of the file is not: what is read should not stay in memory.
    tensors = {
        t.name: _Stored(
            int(t.tensor_type), tuple(int(n) for n in reversed(t.shape)), int(t.data_offset), int(t.n_bytes)
        )
        for t in reader.tensors
    }
    del reader
    numbers = {t.number: t for t in _TYPES.values()}
    parts = gguf_names(manifest.config())

    def rows_of(name: str, start: int, stop: int | None) -> F32:
        t = tensors[name]
        kind = numbers.get(t.ggml_type)
        if kind is None and t.ggml_type != _F32:
            raise BundleError(f"{path}: tensor {name} has a type that phi-export does not write; export it again")
        rows = t.shape[0]
        start, stop = min(start, rows), rows if stop is None else min(stop, rows)
        row_bytes = t.nbytes // rows
        raw = np.fromfile(path, np.uint8, max(0, stop - start) * row_bytes, offset=t.offset + start * row_bytes)
        if kind is None:
            return raw.view("<f4").reshape(-1, *t.shape[1:])
        return ggml.dequantize(raw.reshape(-1, row_bytes), kind)

    def tensor(name: str, start: int = 0, stop: int | None = None) -> F32:
        whole, split = parts[name]
        if whole in tensors:
            return rows_of(whole, start, stop)
        if not split or not all(n in tensors for n in split):
            raise BundleError(f"{path}: tensor {whole} is missing; export the bundle again")
        rows = []  # queries, keys and values lie apart
        for n in split:
            count = tensors[n].shape[0]
            if start < count and (stop is None or stop > 0):
                rows.append(rows_of(n, max(0, start), stop))
            start, stop = start - count, None if stop is None else stop - count
        return np.concatenate(rows) if rows else np.zeros((0, *tensors[split[0]].shape[1:]), np.float32)

    return tensor


def gguf_names(config: Config) -> dict[str, tuple[str, tuple[str, ...]]]:
    """llama.cpp's name of each of the checkpoint's tensors, and those of its parts where it may be split."""
    d = config.decoder()
    names: dict[str, tuple[str, tuple[str, ...]]] = {d.embedding: ("token_embd.weight", ())}

    def add(tensors: tuple[str | None, ...], stem: str, suffix: str, split: tuple[str, ...] = ()) -> None:
        for tensor in tensors:
            if tensor is not None:
                names[tensor] = (f"{stem}.{suffix}", tuple(f"{s}.{suffix}" for s in split))

    for n, layer in enumerate(d.layers):
        p = f"blk.{n}."
        for norm, stem in ((layer.attention_norm, "attn_norm"), (layer.mlp_norm, "ffn_norm")):
            if norm is not None:
                add((norm.weight,), p + stem, "weight")
                add((norm.bias,), p + stem, "bias")
        for tensors, suffix in ((layer.qkv.weight, "weight"), (layer.qkv.bias, "bias")):
            if len(tensors) == 1:
                add(tensors, p + "attn_qkv", suffix, tuple(p + part for part in _PARTS))
            else:
                for tensor, part in zip(tensors, _PARTS, strict=False):
                    add((tensor,), p + part, suffix)
        for role, stem in _LINEARS.items():
            linear = getattr(layer, role)
            add(linear.weight, p + stem, "weight")
            add(linear.bias, p + stem, "bias")
    add((d.final_norm.weight,), "output_norm", "weight")
    add((d.final_norm.bias,), "output_norm", "bias")
    if not d.tied:
        add(d.head.weight, "output", "weight")
    add(d.head.bias, "output", "bias")
    return names


def _entries(config: Config, plan: Quantization, options: ExportOptions) -> list[Entry]:
    names = gguf_names(config)
    entries: list[Entry] = []
    offset = 0

    def add(name: str, ggml_type: int, shape: tuple[int, ...], nbytes: int, **rest: object) -> None:
        nonlocal offset
        entries.append(Entry(name, ggml_type, shape, offset, nbytes, **rest))  # type: ignore[arg-type]
        offset += align(nbytes, _ALIGN)

    rope = config.decoder().rope
    if rope is not None and rope.long:
        for kind in ("long", "short"):
            factors = np.array(getattr(rope, kind), "<f4")
            add(
                f"rope_factors_{kind}.weight",
                _F32,
                factors.shape,
                factors.nbytes,
                item=None,
                quant=None,
                content=factors,
            )
    for item in tensor_groups(config, options):
        quant = plan[item.name]
        whole, split = names[item.tensor]
        name = whole if item.name == item.tensor else split["qkv".index(item.name[-1])]
        if item.role == "vector":
            add(name, _F32, (item.columns,), quant.bytes, item=item, quant=quant)
        else:
            add(name, _TYPES[quant.type].number, (item.rows, item.columns), quant.bytes, item=item, quant=quant)
    return entries


def head_of(checkpoint: Checkpoint, entries: list[Entry], file_type: int, name: str) -> bytes:
    """All that stands before the tensors' content, padded."""
    metadata = _architecture(checkpoint.config, file_type) | tokenizer_metadata(checkpoint, name)
    parts = [b"GGUF" + struct.pack("<IQQ", 3, len(entries), len(metadata))]
    for key, (kind, value) in metadata.items():
        parts.append(encode_string(key) + struct.pack("<I", kind) + encode(kind, value))
    for e in entries:
        dims = struct.pack(f"<{len(e.shape)}Q", *reversed(e.shape))
        parts.append(encode_string(e.name) + struct.pack("<I", len(e.shape)) + dims)
        parts.append(struct.pack("<IQ", e.ggml_type, e.offset))
    head = b"".join(parts)
    return head + bytes(-len(head) % _ALIGN)


def _architecture(config: Config, file_type: int) -> Metadata:
    d = config.decoder()
    arch = _ARCHITECTURES[config.model_type]
    norm = "layer_norm_epsilon" if d.final_norm.bias else "layer_norm_rms_epsilon"
    metadata: Metadata = {
        "general.architecture": (Kind.STRING, arch),
        "general.file_type": (Kind.U32, file_type),
        "general.quantization_version": (Kind.U32, 2),
        f"{arch}.context_length": (Kind.U32, context(config, ExportOptions())),
        f"{arch}.embedding_length": (Kind.U32, d.hidden_size),
        f"{arch}.feed_forward_length": (Kind.U32, d.intermediate_size),
        f"{arch}.block_count": (Kind.U32, len(d.layers)),
        f"{arch}.attention.head_count": (Kind.U32, d.heads),
        f"{arch}.attention.head_count_kv": (Kind.U32, d.kv_heads),
        f"{arch}.attention.{norm}": (Kind.F32, d.norm_eps),
    }
    if d.rope is not None:
        metadata[f"{arch}.rope.dimension_count"] = (Kind.U32, d.rope.dims)
        metadata[f"{arch}.rope.freq_base"] = (Kind.F32, d.rope.theta)
        original = d.rope.original or config.max_position_embeddings
        metadata[f"{arch}.rope.scaling.original_context_length"] = (Kind.U32, original)
        if d.rope.long:
            metadata[f"{arch}.rope.scaling.attn_factor"] = (Kind.F32, d.rope.attention_factor)
    if config.sliding_window is not None:
        metadata[f"{arch}.attention.sliding_window"] = (Kind.U32, config.sliding_window)
    return metadata
