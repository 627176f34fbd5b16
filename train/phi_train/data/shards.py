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
from phi_runtime.text.tokenizer import FILE
from phi_train.data.corpus import documents
from phi_train.data.encoding import CorpusEncoder, open_encoder

INDEX = "shards.json"
_SHARD_TOKENS = 1 << 20

Tokens = npt.NDArray[np.int64]


def write_shards(corpus: str, tokenizer_folder: Path, out: Path) -> None:
    """Tokenise a corpus into `out`.

    Raises OutputExistsError, UsageError for a corpus too small to split, the errors of `documents`
    and of a missing tokenizer.
    """
    if out.exists():
        raise OutputExistsError(f"{out}: exists already; choose another --out")
    encoder, end = open_encoder(tokenizer_folder)
    pending = bytearray()
    counts = {False: 0, True: 0}
    shards: list[str] = []
    with (
        staged_folder(out) as stage,
        open(stage / "heldout.bin", "wb") as heldout,
        open(stage / "heldout.txt", "w", encoding="utf-8") as texts,
    ):

        def flush() -> None:
            shards.append(f"train-{len(shards):05d}.bin")
            (stage / shards[-1]).write_bytes(pending)
            pending.clear()

        for document in documents(corpus):
            tokens = encoder.encode(document.text) + end
            if document.held_out:
                heldout.write(tokens)
                texts.write(("\n" if counts[True] else "") + document.text)
            else:
                pending += tokens
            counts[document.held_out] += len(tokens) // len(end)
            if len(pending) >= _SHARD_TOKENS * len(end):
                flush()
        if pending:
            flush()
        if not shards or not counts[True]:
            raise UsageError(f"corpus {corpus}: too few documents to train on some and hold others out")
        heldout.flush()
        (stage / INDEX).write_text(index_text(stage, shards, encoder, tokenizer_folder))


def index_text(folder: Path, shards: list[str], encoder: CorpusEncoder, tokenizer: Path) -> str:
    """The content of `shards.json` for the shards in a folder; digests so that a mixture can name the folder by one."""
    size = np.dtype(encoder.dtype).itemsize
    names = [*shards, "heldout.bin"]
    tokens = {name: (folder / name).stat().st_size // size for name in names}
    index = {
        "dtype": encoder.dtype,
        "train": shards,
        "train_tokens": sum(tokens[name] for name in shards),
        "heldout_tokens": tokens["heldout.bin"],
        "vocab_size": encoder.tokenizer.vocab_size,
        "tokenizer_sha256": sha256(tokenizer / FILE),
        "sha256": {name: sha256(folder / name) for name in names},
    }
    return json.dumps(index, indent=1) + "\n"


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
                return self._read(shard, index, length)
            index -= count
        raise IndexError(index)

    def heldout_windows(self, length: int, most: int) -> Tokens:
        """Up to `most` windows [n, length], spread evenly over the held-out tokens."""
        count = len(self.heldout) // length
        chosen = np.unique(np.linspace(0, count - 1, min(most, count)).astype(int))
        return np.stack([self._read(self.heldout, i, length) for i in chosen])

    def _read(self, part: np.memmap, index: int, length: int) -> Tokens:
        """Checked as it is read: a token beyond the vocabulary would be read from beyond the embedding."""
        window = np.asarray(part[index * length : (index + 1) * length], np.int64)
        if window.max() >= self.vocab_size:
            raise UsageError(f"{part.filename}: holds a token beyond its vocabulary of {self.vocab_size}; make it anew")
        return window

    def unigram_loss(self, targets: Tokens) -> float:
        """Mean negative log-likelihood, nats, of `targets` under the training tokens' frequencies (add one)."""
        counts = self.token_counts()
        return float(-np.log(counts / counts.sum())[targets].mean())

    def token_counts(self) -> npt.NDArray[np.float64]:
        """How often each token occurs in the training shards, and one more."""
        counts = np.ones(self.vocab_size)
        for shard in self.shards:
            for start in range(0, len(shard), _SHARD_TOKENS):
                found = np.bincount(shard[start : start + _SHARD_TOKENS], minlength=self.vocab_size)
                counts += found[: self.vocab_size]
        return counts


def open_data(folder: Path) -> Data:
    """Map a data folder. Raises NotFoundError, UsageError where it is damaged."""
    if not (folder / INDEX).is_file():
        raise NotFoundError(f"{folder}: holds no {INDEX}; make it with phi-train shards")
    index = read_json(folder / INDEX)
    try:
        dtype = np.dtype({"uint16": np.uint16, "uint32": np.uint32}[index["dtype"]])
        shards = tuple(np.memmap(folder / Path(name).name, dtype, "r") for name in index["train"])
        heldout = np.memmap(folder / "heldout.bin", dtype, "r")
        vocab_size, digest = int(index["vocab_size"]), str(index["tokenizer_sha256"])
        if not shards or len({s.filename for s in (*shards, heldout)}) <= len(shards) or not 0 < vocab_size < 1 << 31:
            raise ValueError("no shards, one twice, or no vocabulary")
    except (KeyError, TypeError, ValueError, OSError, OverflowError) as e:
        raise UsageError(
            f"{folder}: is damaged ({type(e).__name__}: {e}); make it anew with phi-train shards"
        ) from None
    return Data(folder, shards, heldout, digest, vocab_size)


def check_tokenizer(folder: Path, digest: str, tokenizer: Path) -> None:
    """Raise UsageError for data in `folder` that were not made with the tokenizer in another."""
    if not (tokenizer / FILE).is_file() or digest != sha256(tokenizer / FILE):
        raise UsageError(f"{folder}: was not tokenised with {tokenizer}; make it anew with phi-train shards")
