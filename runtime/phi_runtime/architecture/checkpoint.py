"""Read a Hugging Face model folder, a tensor at a time, without trusting anything in it.

The safetensors header is checked in full before any byte of weights is touched: sizes, overlaps,
holes, and that every tensor the architecture needs is there with its shape. Weights are mapped,
never loaded whole.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from phi_runtime.architecture.config import Config, family_of, parse_config, read_json
from phi_runtime.architecture.decoder import F32
from phi_runtime.errors import CheckpointError, NotFoundError, UnsupportedError
from phi_runtime.text.chat_templates import chat_name, get_format
from phi_runtime.text.tokenizer import Tokenizer

# NumPy has no bfloat16; its bits are read as integers.
_STORED = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}
# Of elements; what cannot be a weight may still lie there, as a buffer that is not read.
_BYTES = {"F32": 4, "F16": 2, "BF16": 2, "F64": 8, "I64": 8, "I32": 4, "U8": 1, "BOOL": 1}
# Buffers that older versions of transformers saved along with the weights.
_BUFFERS = re.compile(r".*(\.attn\.attention\.(masked_)?bias|\.rotary_emb\.inv_freq)")
_MAX_HEADER = 100_000_000  # the format's own cap
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
ADAPTER = "adapter_config.json"  # PEFT's


@dataclass(frozen=True)
class Tensor:
    """One tensor on disk; `read` maps it and converts to float32."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path
    offset: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * _BYTES[self.dtype]

    def read(self, start: int = 0, stop: int | None = None) -> F32:
        """Rows start..stop as float32 [stop - start, ...]."""
        stored: np.dtype = np.dtype(_STORED[self.dtype])
        mapped = np.memmap(self.path, dtype=stored, mode="r", offset=self.offset, shape=self.shape)
        rows = np.asarray(mapped[start:stop])
        if self.dtype == "BF16":  # bf16 is the upper half of a float32
            return (rows.astype(np.uint32) << 16).view(np.float32)
        return rows.astype(np.float32)


@dataclass(frozen=True)
class JoinedTensor(Tensor):
    """A matrix that is stored in several tensors: the rows of one, then those of the next."""

    parts: tuple[Tensor, ...] = ()

    def read(self, start: int = 0, stop: int | None = None) -> F32:
        """Rows start..stop as float32, of whichever parts hold them."""
        stop = self.shape[0] if stop is None else min(stop, self.shape[0])
        found, first = [], 0
        for part in self.parts:
            rows = part.shape[0]
            if start < first + rows and stop > first:
                found.append(part.read(max(0, start - first), min(rows, stop - first)))
            first += rows
        return np.concatenate(found) if found else self.parts[0].read(0, 0)


@dataclass(frozen=True)
class Checkpoint:
    """An opened model folder: the configuration and where each tensor lies."""

    folder: Path
    config: Config
    tensors: dict[str, Tensor]
    files: tuple[Path, ...]
    notes: tuple[str, ...] = ()  # what was read otherwise than it is spelt, a line each
    home: Path | None = None  # where to keep what is made of it, None for its folder

    def read(self, name: str, start: int = 0, stop: int | None = None) -> F32:
        """Rows start..stop of a tensor as float32, in the checkpoint's own shape."""
        return self.tensors[name].read(start, stop)


def open_checkpoint(folder: str | Path) -> Checkpoint:
    """Open a checkpoint folder, single-file or sharded, reading headers only.

    Raises NotFoundError, CheckpointError (damaged, incomplete) or UnsupportedError.
    """
    folder = Path(folder)
    if not folder.exists():
        raise NotFoundError(f"{folder}: no such folder; give the folder that holds config.json")
    _check_kind(folder)
    path = folder / "config.json"
    raw = read_json(path)
    config = parse_config(raw, path)
    made_of = family_of(raw, path).parts(config)
    files = _weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for path in files:
        for tensor in read_header(path):
            if tensor.name in tensors:
                raise CheckpointError(f"{path}: tensor {tensor.name} is also in {tensors[tensor.name].path.name}")
            tensors[tensor.name] = tensor
    tensors, notes = _without_prefix(folder, _stored(config, made_of), tensors)
    if config.decoder().tied and _unties(config, tensors):
        config = replace(config, tie_word_embeddings=False)  # type: ignore[type-var]
        notes = (
            *notes,
            f"{folder}: has a head of its own beside a tied configuration; it is kept, as transformers does",
        )
    _check_shapes(folder, config, _stored(config, made_of), tensors)
    for name, stored in made_of.items():
        held = tuple(tensors[part] for part, _ in stored)
        shape = (sum(rows for _, rows in stored), *held[0].shape[1:])
        tensors[name] = JoinedTensor(name, held[0].dtype, shape, held[0].path, held[0].offset, held)
    if made_of:
        notes = (*notes, f"{folder}: is saved as {raw['model_type']}, and read as the {config.model_type} that it is")
    return Checkpoint(folder, config, {name: tensors[name] for name in config.tensor_shapes()}, files, notes)


def _stored(config: Config, made_of: dict[str, tuple[tuple[str, int], ...]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the tensors that the files should hold."""
    return {
        part: (rows, *shape[1:])
        for name, shape in config.tensor_shapes().items()
        for part, rows in made_of.get(name, ((name, shape[0]),))
    }


def _check_kind(folder: Path) -> None:
    """Say what a folder is that holds no plain weights. Raises UnsupportedError."""
    if (folder / ADAPTER).is_file() and not (folder / "config.json").is_file():
        base = read_json(folder / ADAPTER).get("base_model_name_or_path")
        raise UnsupportedError(
            f"{folder}: is a PEFT adapter (LoRA) of {base}, not a whole model; give that model's folder, and this one "
            "with phi-export's --adapter"
        )
    if (folder / "config.json").is_file():
        how = read_json(folder / "config.json").get("quantization_config")
        if isinstance(how, dict):
            method = how.get("quant_method") or ("bitsandbytes" if "load_in_4bit" in how else "unknown")
            raise UnsupportedError(
                f"{folder}: is quantised already ({method}); export the checkpoint it was made from, in 16 or 32 bits, "
                "or dequantise it first (model.dequantize() in transformers)"
            )


def _without_prefix(
    folder: Path, expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Tensors under their own names, where a wrapper (compile, DDP, PEFT) put its name before them."""
    if any(name in tensors for name in expected):
        return tensors, ()
    for prefix in sorted({name[: -len(known)] for known in expected for name in tensors if name.endswith(known)}):
        if all(prefix + known in tensors for known in expected if known != "lm_head.weight"):
            stripped = {
                name.removeprefix(prefix): replace(t, name=name.removeprefix(prefix)) for name, t in tensors.items()
            }
            return stripped, (f"{folder}: its tensors begin with {prefix!r}, which is left out",)
    return tensors, ()


def _unties(config: Config, tensors: dict[str, Tensor]) -> bool:
    """Whether a tied model's file holds a head that is not its embedding."""
    head, embedding = tensors.get("lm_head.weight"), tensors.get(config.decoder().embedding)
    if head is None or embedding is None or head.shape != embedding.shape or not hasattr(config, "tie_word_embeddings"):
        return False
    step = max(1, (1 << 22) // max(1, head.shape[1]))
    return any(
        not np.array_equal(head.read(i, i + step), embedding.read(i, i + step)) for i in range(0, head.shape[0], step)
    )


def read_header(path: Path) -> list[Tensor]:
    """The tensors that a safetensors file declares, after checking every claim against the file."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        prefix = f.read(8)
        length = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or length > _MAX_HEADER or 8 + length > size:
            raise CheckpointError(f"{path}: truncated or not a safetensors file ({size} bytes); copy it again")
        try:
            header = json.loads(f.read(length))
        except (ValueError, RecursionError):
            raise CheckpointError(f"{path}: its header is not valid JSON; copy it again") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{path}: its header is not a JSON object; copy it again")
    header.pop("__metadata__", None)
    tensors = [_tensor(path, name, entry, 8 + length) for name, entry in header.items()]
    end = 8 + length
    for t in sorted(tensors, key=lambda t: (t.offset, t.nbytes)):
        if t.offset != end:
            raise CheckpointError(f"{path}: tensor {t.name} overlaps another or leaves a hole; copy the file again")
        end += t.nbytes
    if end != size:
        raise CheckpointError(f"{path}: header claims {end} bytes, the file has {size}; copy it again")
    return tensors


def _tensor(path: Path, name: str, entry: Any, base: int) -> Tensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = isinstance(dtype, str) and all(type(n) is int and 0 <= n < 2**48 for n in (*shape, start, stop))
    except (TypeError, KeyError, ValueError):
        whole = False
    if not whole or not name.isprintable():
        raise CheckpointError(f"{path}: the header's entry for {name!r} is malformed; copy the file again")
    if dtype not in _BYTES:
        raise CheckpointError(f"{path}: tensor {name} has type {dtype}; we read {', '.join(_STORED)}")
    tensor = Tensor(name, dtype, shape, path, base + start)
    if stop - start != tensor.nbytes:
        raise CheckpointError(
            f"{path}: tensor {name} {list(shape)} {dtype} needs {tensor.nbytes} bytes, its entry spans {stop - start}"
        )
    return tensor


def _weight_files(folder: Path) -> tuple[Path, ...]:
    index, single = folder / _INDEX, folder / _SINGLE
    if single.is_file() or not index.exists():  # a whole file is what transformers takes, whatever an index says
        if not single.is_file() and list(folder.glob("*.bin")):
            raise CheckpointError(
                f"{folder}: holds a pickle (*.bin), which can run code and is never read; "
                "save the model with safe_serialization=True first"
            )
        if not single.is_file():
            raise CheckpointError(f"{folder}: neither {_SINGLE} nor {_INDEX} is there; is the download complete?")
        return (single,)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index}: has no weight_map")
    names = sorted({str(v) for v in weight_map.values()})
    for name in names:
        if not name.isprintable() or Path(name).name != name or not name.endswith(".safetensors"):
            raise CheckpointError(f"{index}: shard {name!r} points outside the folder or is no safetensors file")
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: shard {name} is named by the index but not there; fetch it again")
    files = tuple(folder / name for name in names)
    held = {t.name: f.name for f in files for t in read_header(f)}
    for tensor, name in weight_map.items():
        if held.get(tensor) != name:
            raise CheckpointError(f"{index}: says {tensor} is in {name}, but it is not; fetch the shard again")
    return files


def _check_shapes(
    folder: Path, config: Config, expected: dict[str, tuple[int, ...]], tensors: dict[str, Tensor]
) -> None:
    for name, shape in expected.items():
        if name not in tensors:
            packed = next((n for n in tensors if n.startswith(name.removesuffix("weight")) or "lora_" in n), None)
            if packed is not None:
                raise UnsupportedError(
                    f"{folder}: has {packed} in place of {name}: the weights are quantised or an adapter's; "
                    "export the checkpoint in 16 or 32 bits, with adapters merged"
                )
            raise CheckpointError(
                f"{folder}: tensor {name} is missing (it holds {', '.join(sorted(tensors)[:2])} and others); "
                "is config.json its own, and the checkpoint complete?"
            )
        if tensors[name].dtype not in _STORED:
            raise CheckpointError(
                f"{tensors[name].path}: tensor {name} has type {tensors[name].dtype}; we read {', '.join(_STORED)}"
            )
        if tensors[name].shape != shape:
            raise CheckpointError(
                f"{tensors[name].path}: tensor {name} has shape {list(tensors[name].shape)}, "
                f"config.json implies {list(shape)}"
            )
    tied = {"lm_head.weight"} if config.decoder().tied else set()  # some write the embedding out twice
    extra = sorted(n for n in set(tensors) - set(expected) - tied if not _BUFFERS.fullmatch(n))
    if extra:
        raise CheckpointError(
            f"{folder}: tensor {extra[0]} is not part of {config.model_type}; is config.json its own?"
        )


def stop_tokens(checkpoint: Checkpoint) -> tuple[int, ...]:
    """Tokens that end an answer: those that generation_config.json names as eos, as transformers has it, or, where it
    names none, config.json; and the one that ends a turn of its chat format.

    Raises CheckpointError for what is no token of the vocabulary.
    """
    named: list[Any] = []
    for name in ("generation_config.json", "config.json"):
        path = checkpoint.folder / name
        if not named and path.is_file():
            eos = read_json(path).get("eos_token_id")
            named = eos if isinstance(eos, list) else [] if eos is None else [eos]
    ids = [t for t in (*named, chat_end(checkpoint.folder)) if t is not None]
    if not all(type(t) is int and 0 <= t < checkpoint.config.vocab_size for t in ids):
        raise CheckpointError(f"{checkpoint.folder}: eos_token_id names a token outside the vocabulary: {ids}")
    return tuple(sorted(set(ids)))


def chat_end(folder: Path) -> int | None:
    """The token that ends a turn of a folder's chat format, None where we know no format or it has no such token."""
    name = chat_name(folder)
    return None if name is None else Tokenizer(folder).id(get_format(name).end)
