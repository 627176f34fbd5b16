"""One shard through one pass of a pipeline: read, take the steps, write, and count. The same input gives the same
bytes, so that a shard that a kill left half-done is simply done again.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from phi_runtime.files import write_file
from phi_train.curate.config import DataConfig, MinHash, Step
from phi_train.curate.documents import Document, Slice, read_own, read_slice
from phi_train.curate.funnel import StepCount
from phi_train.curate.minhash import Signer
from phi_train.curate.steps import Apply, Dropped, build
from phi_train.data.corpus import held_out
from phi_train.data.encoding import open_encoder

_UNREADABLE_SHOWN = 10


@dataclass(frozen=True)
class Pass:
    """Steps that look at one document alone; then near duplicates are found, unless it is the last."""

    number: int
    steps: tuple[Step, ...]
    minhash: MinHash | None

    def name(self, index: int) -> str:
        """Of one of its steps."""
        return str(self.steps[index].__struct_config__.tag)


def passes(config: DataConfig) -> list[Pass]:
    """The pipeline, cut behind each MinHash."""
    cuts = [n for n, s in enumerate(config.step) if isinstance(s, MinHash)]
    bounds = [-1, *cuts, len(config.step)]
    found = []
    for n, (before, at) in enumerate(pairwise(bounds)):
        step = config.step[at] if at < len(config.step) else None
        found.append(Pass(n, config.step[before + 1 : at], step if isinstance(step, MinHash) else None))
    return found


class Record(msgspec.Struct):
    """That a shard is done, and what was counted; `files` with their bytes, to see that they are whole."""

    files: dict[str, int]
    read: int = 0
    documents: int = 0
    tokens: int = 0
    heldout_tokens: int = 0
    unreadable: dict[str, int] = {}
    unreadable_first: list[str] = []
    steps: list[StepCount] = []


class ShardRunner:
    """Does shards of one pass; `folder` is the run's."""

    def __init__(self, config: DataConfig, which: Pass, folder: Path) -> None:
        self._config, self._pass, self._folder = config, which, folder
        self._last = which.minhash is None
        self._encoder, self._end = None, b""
        if self._last and config.tokenizer is not None:
            self._encoder, self._end = open_encoder(Path(config.tokenizer))

    def run(self, number: int, shard: list[Slice], duplicates: np.ndarray | None) -> Record:
        """Write its files and, last, its record. duplicates: of the documents that the pass before left."""
        record = Record({}, steps=[StepCount(self._pass.name(n)) for n in range(len(self._pass.steps))])
        steps: list[Apply] = [build(s) for s in self._pass.steps]
        if duplicates is not None:
            record.steps.insert(0, StepCount("minhash"))
        out = _Out(self._pass.minhash)
        for n, document in enumerate(self._documents(number, shard, record)):
            text: str | None = document.text
            counts = iter(record.steps)
            if duplicates is not None:
                text = None if duplicates[n] else text
                next(counts).add(document.id, document.text, text, "near duplicate", 0.0)
            for apply, count in zip(steps, counts, strict=True):
                if text is None:
                    break
                began = time.perf_counter()
                after = apply(text)
                why, kept = (after.why, None) if isinstance(after, Dropped) else ("", after)
                count.add(document.id, text, kept, why, time.perf_counter() - began)
                text = kept
            if text is not None:
                record.documents += 1
                self._keep(document, text, out)
        self._write(number, out, record)
        return record

    def _documents(self, number: int, shard: list[Slice], record: Record) -> Iterator[Document]:
        field = self._config.field
        if self._pass.number:
            for document in read_own(self._folder / "work" / f"{self._pass.number - 1}-{number:05d}.jsonl", field):
                record.read += 1
                yield document
            return
        for one in shard:
            for found in read_slice(one, field):
                if isinstance(found, Document):
                    record.read += 1
                    yield found
                    continue
                record.unreadable[found.why] = record.unreadable.get(found.why, 0) + 1
                if len(record.unreadable_first) < _UNREADABLE_SHOWN:
                    record.unreadable_first.append(f"{found.id}: {found.why}")

    def _keep(self, document: Document, text: str, out: "_Out") -> None:
        if not self._last or self._config.documents:
            out.lines.append(_line(document, text, self._config.field))
        if out.sign is not None:
            out.signatures.append(out.sign(text))
        if self._encoder is not None:
            split = held_out(document.id)
            out.tokens[split] += [self._encoder.encode(text), self._end]
            if split:
                out.texts.append(text)

    def _write(self, number: int, out: "_Out", record: Record) -> None:
        folder, work = self._folder, self._folder / "work"
        files: dict[Path, bytes] = {}
        name = f"{self._pass.number}-{number:05d}"
        if not self._last:
            assert self._pass.minhash is not None
            files[work / f"{name}.jsonl"] = b"".join(out.lines)
            empty = np.zeros((0, self._pass.minhash.buckets), np.uint64)
            files[work / f"{name}.sig"] = np.concatenate([empty, *(s[None] for s in out.signatures)]).tobytes()
        elif self._config.documents:
            files[folder / "documents" / f"{number:05d}.jsonl"] = b"".join(out.lines)
        if self._encoder is not None:
            parts = {split: b"".join(out.tokens[split]) for split in (False, True)}
            record.tokens, record.heldout_tokens = (len(parts[split]) // len(self._end) for split in (False, True))
            files[folder / "shards" / f"train-{number:05d}.bin"] = parts[False]
            files[work / f"heldout-{number:05d}.bin"] = parts[True]
            files[work / f"heldout-{number:05d}.txt"] = "".join(f"{t}\n" for t in out.texts).encode()
        for path, content in files.items():
            write_file(path, content)
            record.files[str(path.relative_to(folder))] = len(content)
        write_file(record_path(folder, self._pass.number, number), msgspec.json.encode(record))


class _Out:
    """What is kept of a shard, which is as much as fits in memory."""

    def __init__(self, minhash: MinHash | None) -> None:
        self.lines: list[bytes] = []
        self.sign = None if minhash is None else Signer(minhash)
        self.signatures: list[np.ndarray] = []
        self.tokens: dict[bool, list[bytes]] = {False: [], True: []}
        self.texts: list[str] = []


def record_path(folder: Path, which: int, number: int) -> Path:
    """Where a shard's record is."""
    return folder / "work" / f"{which}-{number:05d}.json"


def done(folder: Path, which: int, number: int) -> Record | None:
    """A shard's record, if it is done and its files are whole."""
    try:
        record = msgspec.json.decode(record_path(folder, which, number).read_bytes(), type=Record)
        whole = all((folder / name).stat().st_size == size for name, size in record.files.items())
    except (OSError, msgspec.MsgspecError):
        return None
    return record if whole else None


def _line(document: Document, text: str, field: str) -> bytes:
    """As it was, with an id, and the text as it is now."""
    record: dict[str, Any] = msgspec.json.decode(document.line)
    if record.get("id") == document.id and text == document.text:
        return document.line
    return msgspec.json.encode({"id": document.id} | record | {"id": document.id, field: text}) + b"\n"
