"""Mixtures: named data folders and the share of the training tokens that each gives. A recipe takes the manifest's file
where it takes a folder: `data.shards=mixture.toml`.

Which window a row of a batch is depends on the seed and on the row's number alone. Each thousand rows hold the ratios
exactly, to one row.
"""

import math
import tomllib
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np

from phi_runtime.contract import StrictContract, convert
from phi_runtime.errors import NotFoundError, UsageError
from phi_runtime.files import sha256
from phi_train.data.batch import Order
from phi_train.data.shards import INDEX, Data, Tokens, open_data

_BLOCK = 1000  # rows that hold the ratios
_EXACT = 1e-6  # how far ratios may sum from one

_Ratio = Annotated[float, msgspec.Meta(gt=0, le=1)]


class Source(StrictContract, frozen=True, kw_only=True):
    """A data folder of a mixture.

    shards: the folder, relative to the manifest's. ratio: its share of the training tokens. max_repetition: how often
    a token may be seen. tokens, sha256: what it had, and the digest of its shards.json, which has those of its files.
    filter: the fingerprint of the pipeline that made it.
    """

    name: str
    shards: str
    ratio: _Ratio
    max_repetition: Annotated[float, msgspec.Meta(gt=0, le=1e9)] = 1.0
    tokens: Annotated[int, msgspec.Meta(ge=0)] | None = None
    sha256: str | None = None
    licence: str | None = None
    filter: str | None = None


class Mixture(StrictContract, frozen=True, kw_only=True):
    """A manifest."""

    name: str
    source: tuple[Source, ...]

    def __post_init__(self) -> None:
        if not self.source:
            raise ValueError("source: there is none")
        names = [s.name for s in self.source]
        if len(set(names)) < len(names):
            raise ValueError("source: two have one name")
        if abs((total := math.fsum(s.ratio for s in self.source)) - 1) > _EXACT:
            raise ValueError(f"source: the ratios sum to {total:g}, not to one")


def read_mixture(path: Path) -> Mixture:
    """A manifest from a .toml file. Raises NotFoundError, UsageError naming the field."""
    try:
        return convert(tomllib.loads(path.read_text(encoding="utf-8")), Mixture)
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file; give a mixture's .toml, or a data folder") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UsageError(f"{path}: {' '.join(str(e).split())}") from None


def open_mixture(path: Path, mixture: Mixture | None = None) -> tuple[Mixture, list[Data]]:
    """The manifest and its opened folders; `mixture` where its file is yet to be written.

    Raises NotFoundError and UsageError for a source that is gone, is not the one of the manifest, or was tokenised
    otherwise than the first.
    """
    mixture, opened = mixture or read_mixture(path), []
    for s in mixture.source:
        folder = path.parent / s.shards
        if not (folder / INDEX).is_file():
            raise NotFoundError(f"{path}: source {s.name}: {folder} holds no {INDEX}; make it anew or correct the path")
        if s.sha256 is not None and sha256(folder / INDEX) != s.sha256:
            raise UsageError(
                f"{path}: source {s.name}: {folder} is not what the manifest was written for (its {INDEX} has another "
                "sha256); write it anew with phi-train data mixture"
            )
        opened.append(open_data(folder))
        if opened[-1].tokenizer_sha256 != opened[0].tokenizer_sha256:
            raise UsageError(
                f"{path}: source {s.name} was tokenised with another tokenizer than {mixture.source[0].name}"
            )
    return mixture, opened


class MixtureOrder:
    """Which source and which of its windows each row is."""

    def __init__(self, ratios: list[float], counts: list[int], seed: int) -> None:
        self._quotas = quotas(ratios, _BLOCK)
        self._orders = [Order(count, seed + n) for n, count in enumerate(counts)]
        self._seed = seed
        self._known: tuple[int, np.ndarray] = (-1, np.zeros(0))

    def take(self, number: int, size: int) -> list[tuple[int, int]]:
        """(source, window) of each row of batch `number`."""
        return [self._row(row) for row in range(number * size, (number + 1) * size)]

    def _row(self, row: int) -> tuple[int, int]:
        block, place = divmod(row, _BLOCK)
        sources = self._sources(block)
        source = int(sources[place])
        before = block * self._quotas[source] + int((sources[:place] == source).sum())
        return source, self._orders[source].take(before, 1)[0]

    def _sources(self, block: int) -> np.ndarray:
        if self._known[0] != block:
            all_rows = np.repeat(np.arange(len(self._quotas)), self._quotas)
            drawn = np.random.default_rng([self._seed, block, len(self._quotas)]).permutation(all_rows)
            self._known = block, drawn
        return self._known[1]


def quotas(ratios: list[float], rows: int) -> list[int]:
    """Rows of each source, by largest remainder; every source has one, as far as there are rows."""
    wanted = np.asarray(ratios) * rows
    out = np.maximum(1, np.floor(wanted + 1e-9)).astype(int)
    while out.sum() > rows:
        out[np.argmax(out - wanted)] -= 1
    while out.sum() < rows:
        out[np.argmax(wanted - out)] += 1
    return [int(n) for n in out]


class MixedWindows:
    """The windows of a mixture, as `Data` has those of a folder."""

    def __init__(self, path: Path, mixture: Mixture, parts: list[Data]) -> None:
        self.folder, self.mixture, self._parts = path, mixture, parts
        self.tokenizer_sha256, self.vocab_size = parts[0].tokenizer_sha256, max(p.vocab_size for p in parts)

    def order(self, rows: int, length: int, seed: int) -> MixtureOrder:
        """For so many rows in all. Raises UsageError for a source that has too few tokens for its share of them."""
        counts = [p.windows(length) for p in self._parts]
        per_block = quotas([s.ratio for s in self.mixture.source], _BLOCK)
        for s, count, quota in zip(self.mixture.source, counts, per_block, strict=True):
            needed = math.ceil(rows * quota / _BLOCK)
            if needed > count * s.max_repetition:
                raise UsageError(
                    f"{self.folder}: source {s.name}: has {count * length:,} tokens in windows of {length}, its share "
                    f"of the run is {needed * length:,}, which repeats them {needed / max(count, 1):.2f} times; allow "
                    f"that by max_repetition ({s.max_repetition:g}), give it more tokens, or a smaller ratio"
                )
        return MixtureOrder([s.ratio for s in self.mixture.source], counts, seed)

    def window(self, row: tuple[int, int], length: int) -> Tokens:
        """A row's tokens."""
        source, index = row
        return self._parts[source].window(index, length)

    def heldout_windows(self, length: int, most: int) -> Tokens:
        """Up to `most` windows [n, length] of what the sources hold out, by their ratios."""
        shares = quotas([s.ratio for s in self.mixture.source], max(most, len(self._parts)))
        some = [
            p.heldout_windows(length, n) for p, n in zip(self._parts, shares, strict=True) if len(p.heldout) >= length
        ]
        if not some:
            raise UsageError(f"{self.folder}: none of its sources holds out a sequence of {length} tokens")
        return np.concatenate(some)

    def unigram_loss(self, targets: Tokens) -> float:
        """As of `Data`, the sources' frequencies weighted by their ratios."""
        found = np.zeros(self.vocab_size)
        for s, part in zip(self.mixture.source, self._parts, strict=True):
            counts = part.token_counts()
            found[: len(counts)] += s.ratio * counts / counts.sum()
        return float(-np.log(found / found.sum())[targets].mean())
