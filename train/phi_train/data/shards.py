"""Tokenised corpora: memory-mapped shards of token ids, and windows drawn from them.

A data folder holds `train-*.bin`, `heldout.bin` (unsigned 16- or 32-bit ids, documents joined by
`<|endoftext|>`), `heldout.txt` (the held-out text itself) and `shards.json`.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from phi_runtime.architecture.config import read_json
from phi_runtime.errors import NotFoundError, OutputExistsError, UsageError
from phi_runtime.files import sha256, staged_folder
from phi_runtime.text.tokenizer import FILE, Tokenizer
from phi_train.data.corpus import documents
from phi_train.data.tokenizer import END_OF_TEXT

_INDEX = "shards.json"
_SHARD_TOKENS = 1 << 20

Tokens = npt.NDArray[np.int64]


def write_shards(corpus: str, tokenizer_folder: Path, out: Path) -> None:
    """Tokenise a corpus into `out`.

    Raises OutputExistsError, UsageError for a corpus too small to split, the errors of `documents`
    and of a missing tokenizer.
    """
    if out.exists():
        raise OutputExistsError(f"{out}: exists already; choose another --out")
    tokenizer = Tokenizer(tokenizer_folder)
    end = tokenizer.id(END_OF_TEXT)
    if end is None:
        raise UsageError(f"{tokenizer_folder}: its tokenizer has no {END_OF_TEXT}, which separates documents")
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    pending: dict[bool, list[int]] = {False: [], True: []}
    counts = {False: 0, True: 0}
    texts = []
    shards: list[str] = []
    with staged_folder(out) as stage:

        def flush(tokens: list[int]) -> None:
            shards.append(f"train-{len(shards):05d}.bin")
            (stage / shards[-1]).write_bytes(np.array(tokens, dtype).tobytes())

        for document in documents(corpus):
            tokens = [*tokenizer.encode(document.text), end]
            pending[document.held_out] += tokens
            counts[document.held_out] += len(tokens)
            if document.held_out:
                texts.append(document.text)
            elif len(pending[False]) >= _SHARD_TOKENS:
                flush(pending[False])
                pending[False] = []
        if pending[False]:
            flush(pending[False])
        if not shards or not pending[True]:
            raise UsageError(f"corpus {corpus}: too few documents to train on some and hold others out")
        (stage / "heldout.bin").write_bytes(np.array(pending[True], dtype).tobytes())
        (stage / "heldout.txt").write_text("\n".join(texts), encoding="utf-8")
        index = {
            "dtype": dtype,
            "train": shards,
            "train_tokens": counts[False],
            "heldout_tokens": counts[True],
            "vocab_size": tokenizer.vocab_size,
            "tokenizer_sha256": sha256(tokenizer_folder / FILE),
        }
        (stage / _INDEX).write_text(json.dumps(index, indent=1) + "\n")


@dataclass(frozen=True)
class Data:
    """An opened data folder."""

    folder: Path
    shards: tuple[np.memmap, ...]
    heldout: np.memmap
    tokenizer_sha256: str
    vocab_size: int

    def windows(self, length: int) -> int:
        """Whole windows of `length` tokens in all training shards."""
        return sum(len(s) // length for s in self.shards)

    def window(self, index: int, length: int) -> Tokens:
        """Window number `index` of the training tokens."""
        for shard in self.shards:
            count = len(shard) // length
            if index < count:
                return np.asarray(shard[index * length : (index + 1) * length], np.int64)
            index -= count
        raise IndexError(index)

    def heldout_windows(self, length: int, most: int) -> Tokens:
        """Up to `most` windows [n, length], spread evenly over the held-out tokens."""
        count = len(self.heldout) // length
        chosen = np.unique(np.linspace(0, count - 1, min(most, count)).astype(int))
        return np.stack([np.asarray(self.heldout[i * length : (i + 1) * length], np.int64) for i in chosen])

    def unigram_loss(self, targets: Tokens) -> float:
        """Mean negative log-likelihood, nats, of `targets` under the training tokens' frequencies (add one)."""
        counts = np.ones(self.vocab_size)
        for shard in self.shards:
            counts += np.bincount(shard, minlength=self.vocab_size)
        return float(-np.log(counts / counts.sum())[targets].mean())


def open_data(folder: Path) -> Data:
    """Map a data folder. Raises NotFoundError, or UsageError where it is damaged or holds ids beyond its vocabulary."""
    if not (folder / _INDEX).is_file():
        raise NotFoundError(f"{folder}: holds no {_INDEX}; make it with phi-train shards")
    index = read_json(folder / _INDEX)
    try:
        dtype = np.dtype({"uint16": np.uint16, "uint32": np.uint32}[index["dtype"]])
        shards = tuple(np.memmap(folder / Path(name).name, dtype, "r") for name in index["train"])
        heldout = np.memmap(folder / "heldout.bin", dtype, "r")
        vocab_size, digest = int(index["vocab_size"]), str(index["tokenizer_sha256"])
    except (KeyError, TypeError, ValueError, OSError, OverflowError) as e:
        raise UsageError(
            f"{folder}: is damaged ({type(e).__name__}: {e}); make it anew with phi-train shards"
        ) from None
    for part in (*shards, heldout):
        if int(part.max()) >= vocab_size:
            raise UsageError(f"{part.filename}: holds a token beyond its vocabulary of {vocab_size}; make it anew")
    return Data(folder, shards, heldout, digest, vocab_size)


def check_tokenizer(folder: Path, digest: str, tokenizer: Path) -> None:
    """Raise UsageError for data in `folder` that were not made with the tokenizer in another."""
    if not (tokenizer / FILE).is_file() or digest != sha256(tokenizer / FILE):
        raise UsageError(f"{folder}: was not tokenised with {tokenizer}; make it anew with phi-train shards")
