"""A checkpoint as GGUF without quantisation, for llama.cpp's own tools to quantise."""

from pathlib import Path

import numpy as np

from phi_export.formats import tensor_groups
from phi_export.formats.gguf.write import Entry, gguf_names, head_of
from phi_export.formats.parallel_writer import align
from phi_runtime.architecture.checkpoint import Checkpoint
from phi_runtime.architecture.decoder import F32
from phi_runtime.files import disk_full_named
from phi_runtime.package.manifest import ExportOptions

_ALIGN = 32
_F32, _BF16 = 0, 30  # ggml types
_FILE_TYPES = {_F32: 0, _BF16: 32}  # llama_ftype
_ROWS = 4096  # of a matrix that are held at a time


def write_unquantised(checkpoint: Checkpoint, path: Path) -> None:
    """Matrices in bfloat16 where the checkpoint has them so, in float32 otherwise; vectors in float32.

    Raises UnsupportedError for an architecture that GGUF does not carry, DiskFullError.
    """
    config = checkpoint.config
    exact = all(t.dtype == "BF16" for t in checkpoint.tensors.values())
    kind, size = (_BF16, 2) if exact else (_F32, 4)
    names, offset = gguf_names(config), 0
    entries: list[Entry] = []
    for item in tensor_groups(config, ExportOptions()):
        vector = item.role == "vector"
        shape = (item.columns,) if vector else (item.rows, item.columns)
        nbytes = item.columns * 4 if vector else item.rows * item.columns * size
        entries.append(Entry(names[item.tensor][0], _F32 if vector else kind, shape, offset, nbytes, item, None))
        offset += align(nbytes, _ALIGN)
    head = head_of(checkpoint, entries, _FILE_TYPES[kind], checkpoint.folder.resolve().name)
    with disk_full_named(path), open(path, "wb") as file:
        file.write(head)
        for entry in entries:
            assert entry.item is not None
            tensor = entry.item.tensor
            file.seek(len(head) + entry.offset)
            if entry.item.role == "vector":
                file.write(checkpoint.read(tensor).astype("<f4").tobytes())
                continue
            for start in range(0, entry.item.rows, _ROWS):
                rows = checkpoint.read(tensor, start, start + _ROWS)
                file.write((_bf16(rows) if kind == _BF16 else rows.astype("<f4")).tobytes())


def _bf16(rows: F32) -> np.ndarray:
    """The upper halves, exact for what was bfloat16."""
    return (np.ascontiguousarray(rows, "<f4").view("<u4") >> 16).astype("<u2")
