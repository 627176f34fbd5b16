"""The checkpoint that quality is held to: its own row, and its logits."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np

from phi_bench.measure.models import folder_digest
from phi_bench.records import CheckpointRow, LossAt
from phi_export.verify.text import sample_tokens
from phi_runtime.architecture.checkpoint import Checkpoint
from phi_runtime.architecture.config import num_parameters
from phi_runtime.backends.reference import Reference
from phi_runtime.contract import Contract, decode, read_record
from phi_runtime.errors import CheckpointError, DiskFullError
from phi_train.trainer.summary import Summary

_T = TypeVar("_T")
_REMEDY = "move the training folder away to leave it out"


class _LogLine(Contract, frozen=True):
    """What the page needs of a line of `training/log.jsonl`."""

    step: int
    loss: float


class _Recipe(Contract, frozen=True):
    """What the page needs of `training/recipe.json`."""

    name: str


def describe_checkpoint(checkpoint: Checkpoint) -> CheckpointRow:
    """The checkpoint's row, and how it was trained where its folder tells. Raises CheckpointError."""
    training = checkpoint.folder / "training"
    recipe = _read(training / "recipe.json", _Recipe)
    return CheckpointRow(
        name=recipe.name if recipe else checkpoint.folder.resolve().name,
        parameters=num_parameters(checkpoint.config),
        file_bytes=sum(f.stat().st_size for f in checkpoint.folder.iterdir() if f.is_file()),
        bits_per_weight=8 * sum(t.nbytes for t in checkpoint.tensors.values()) / num_parameters(checkpoint.config),
        perplexity=None,
        training=_read(training / "summary.json", Summary),
        loss=_losses(training / "log.jsonl"),
        sha256=folder_digest(checkpoint.folder),
    )


@contextmanager
def reference_logits(
    checkpoint: Checkpoint, text: Path, count: int, length: int, progress: Callable[[str], None]
) -> Iterator[Path]:
    """A folder with the checkpoint's logits over a text, in windows of `length` from an empty context, for other
    processes to map: `logits.npy` [T, vocab_size] in float32, `tokens.npy` [T], `window.npy`. It is gone at the end.
    """
    tokens = sample_tokens(checkpoint, text, count)
    decoder = checkpoint.config.decoder()
    with tempfile.TemporaryDirectory(prefix="phi-edge-") as name:
        folder = Path(name)
        need = 4 * len(tokens) * checkpoint.config.vocab_size
        if shutil.disk_usage(folder).free < 1.1 * need:
            raise DiskFullError(
                f"{folder}: the checkpoint's logits take {need / 1e9:.1f} GB; free some, or give fewer --tokens"
            )
        np.save(folder / "tokens.npy", np.asarray(tokens, np.int64))
        np.save(folder / "window.npy", length)
        out = np.lib.format.open_memmap(
            folder / "logits.npy", "w+", np.float32, (len(tokens), checkpoint.config.vocab_size)
        )
        for start in range(0, len(tokens), length):
            piece = tokens[start : start + length]
            progress(f"the checkpoint's logits: token {start} of {len(tokens)}")
            exact = Reference(decoder, checkpoint.read, 0).forward(piece, True)[0]
            if not np.isfinite(exact).all():
                raise CheckpointError(f"{checkpoint.folder}: its logits are no finite numbers; fetch or save it again")
            out[start : start + len(piece)] = exact
        out.flush()
        del out
        yield folder


def _losses(log: Path) -> tuple[LossAt, ...]:
    try:
        lines = [decode(line, _LogLine) for line in log.read_bytes().splitlines()] if log.is_file() else []
    except ValueError as e:
        raise CheckpointError(f"{log}: {e}; {_REMEDY}") from None
    return tuple(LossAt(line.step, line.loss) for line in lines)


def _read(path: Path, kind: type[_T]) -> _T | None:
    return read_record(path, kind, CheckpointError, _REMEDY) if path.is_file() else None
