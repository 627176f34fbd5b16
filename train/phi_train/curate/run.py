"""Run a pipeline over a corpus: shards side by side, again from where a kill left it.

A run's folder holds `run.json` (what it was asked for and of which files), `work/` until it is done, `documents/`,
`shards/` for the trainer, `funnel.json` and `funnel.html`.
"""

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from io import BytesIO
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from phi_runtime.contract import Contract, encode, read_record
from phi_runtime.errors import OutputExistsError, PhiError, UsageError
from phi_runtime.files import disk_full_named, locked, sha256, write_file
from phi_runtime.text.tokenizer import FILE
from phi_runtime.version import __version__
from phi_train.curate.config import DataConfig
from phi_train.curate.documents import Slice, slices
from phi_train.curate.funnel import Funnel, StepCount, page
from phi_train.curate.minhash import duplicates
from phi_train.curate.shard import Pass, Record, ShardRunner, done, passes
from phi_train.curate.steps import build
from phi_train.data.encoding import open_encoder
from phi_train.data.shards import INDEX, index_text
from phi_train.orphan import when_orphaned

_RUN, _DONE = "run.json", ".done"
_WRITTEN = ("work", "documents", "shards", "funnel.json", "funnel.html")  # of a run
# Told the pass, its shards that are done, and all of them.
Progress = Callable[[int, int, int], None]


class Run(Contract, frozen=True):
    """What a run was asked for, and the digest of each file that it reads."""

    version: str
    config: DataConfig
    tokenizer_sha256: str | None
    files: dict[str, str]

    def fingerprint(self) -> str:
        """Of all of it."""
        return hashlib.sha256(encode(self).encode()).hexdigest()


def run(
    config: DataConfig, out: Path, workers: int = 1, force: bool = False, progress: Progress = lambda *_: None
) -> Funnel:
    """Write OUT; a run that was stopped goes on.

    Raises OutputExistsError for what is complete or was begun with another pipeline or other files, naming the first
    difference; PhiError where another run is writing it or a worker was killed; the errors of reading and of steps.
    """
    which = passes(config)
    for step in (s for p in which for s in p.steps):
        build(step)  # before anything is written
    shards = slices([Path(source) for source in config.input], config.shard_bytes)
    if not shards:
        raise UsageError(f"{', '.join(config.input)}: holds no documents; give files that are not empty")
    _apart(config, out)
    if out.exists() and not out.is_dir():
        raise OutputExistsError(f"{out}: is a file; choose another --out")
    if config.tokenizer is not None:
        open_encoder(Path(config.tokenizer))
    asked = _asked(config, shards)
    with disk_full_named(out):
        out.mkdir(parents=True, exist_ok=True)

    def busy() -> None:
        raise PhiError(f"{out}: another run is writing it; wait for it, or choose another --out")

    with locked(out, busy), disk_full_named(out):
        _begin(asked, out, force)
        records: list[list[Record]] = []
        for p in which:
            records.append(_run_pass(config, p, out, shards, workers, progress))
            if p.minhash is not None:
                _find_duplicates(out, p, len(shards))
        _check_unchanged(asked)
        funnel = _funnel(asked, records, len(shards))
        _finish(asked, out, funnel, len(shards))
    os.rename(out / "work", out / _DONE)  # at once: half of it would have to be made again
    shutil.rmtree(out / _DONE)
    return funnel


def _apart(config: DataConfig, out: Path) -> None:
    """What is read is not below what is written, nor the other way round."""
    mine = out.resolve()
    for name in (*config.input, *([config.tokenizer] if config.tokenizer is not None else [])):
        if "\0" in name:
            raise UsageError(f"{name!r}: is no path; correct it")
        other = Path(name).resolve()
        if other.is_relative_to(mine) or mine.is_relative_to(other):
            raise UsageError(f"{out}: --out and {name}, which is read, lie in each other; choose another --out")


def _check_unchanged(asked: Run) -> None:
    for path, digest in asked.files.items():
        if not Path(path).is_file() or sha256(Path(path)) != digest:
            raise UsageError(f"{path}: has changed while it was read; begin anew with --force")


def _asked(config: DataConfig, shards: list[list[Slice]]) -> Run:
    paths = dict.fromkeys(s.path for shard in shards for s in shard)
    digest = sha256(Path(config.tokenizer) / FILE) if config.tokenizer is not None else None
    return Run(__version__, config, digest, {p: sha256(Path(p)) for p in paths})


def _begin(asked: Run, out: Path, force: bool) -> None:
    """Make the folder, or see that what is there was begun with the same."""
    begun = (out / _RUN).is_file()
    if not begun and out.exists() and any(not p.name.startswith(".") for p in out.iterdir()):
        raise OutputExistsError(f"{out}: exists already and is no run of phi-train data; choose another --out")
    before = read_record(out / _RUN, Run, OutputExistsError, "it is no run of ours; choose another") if begun else None
    shutil.rmtree(out / _DONE, ignore_errors=True)  # of a run that was killed at its very end
    if before is not None and force:
        for name in _WRITTEN:
            shutil.rmtree(out / name, ignore_errors=True)
            if not (out / name).is_dir():
                (out / name).unlink(missing_ok=True)
    elif before is not None:
        _check_same(before, asked, out)
    write_file(out / _RUN, encode(asked))
    wanted = {"work": True, "documents": asked.config.documents, "shards": asked.config.tokenizer is not None}
    for name in (n for n, is_wanted in wanted.items() if is_wanted):
        (out / name).mkdir(exist_ok=True)


def _check_same(before: Run, asked: Run, out: Path) -> None:
    if (out / "funnel.json").is_file() and not (out / "work").exists():
        raise OutputExistsError(f"{out}: is complete; choose another --out, or replace it with --force")
    if before != asked:
        raise OutputExistsError(
            f"{out}: was begun with {_difference(before, asked)}; choose another --out, or begin anew with --force"
        )


def _difference(before: Run, asked: Run) -> str:
    for path in sorted(before.files.keys() | asked.files.keys()):
        if before.files.get(path) != asked.files.get(path):
            both = path in asked.files and path in before.files
            return f"another {path}" if both else f"{'' if path in before.files else 'no '}{path} among its files"
    for name in DataConfig.__struct_fields__:
        if getattr(before.config, name) != getattr(asked.config, name):
            return f"another {name}"
    return "another tokenizer" if before.version == asked.version else f"version {before.version} of phi-edge"


def _run_pass(
    config: DataConfig, which: Pass, out: Path, shards: list[list[Slice]], workers: int, progress: Progress
) -> list[Record]:
    found = {n: r for n in range(len(shards)) if (r := done(out, which.number, n)) is not None}
    left = [n for n in range(len(shards)) if n not in found]
    progress(which.number, len(found), len(shards))
    try:
        for n, record in _work(config, which, out, shards, left, workers):
            found[n] = record
            progress(which.number, len(found), len(shards))
    except FileNotFoundError as e:
        raise UsageError(f"{e.filename}: has gone while it was read; begin anew with --force") from None
    return [found[n] for n in range(len(shards))]


def _work(
    config: DataConfig, which: Pass, out: Path, shards: list[list[Slice]], left: list[int], workers: int
) -> Iterator[tuple[int, Record]]:
    if not left:
        return
    if workers == 1:
        _prepare(config, which, out)
        for n in left:
            yield n, _task(n, shards[n])
        return
    pool = ProcessPoolExecutor(
        min(workers, len(left)), get_context("spawn"), _prepare, (config, which, out, os.getpid())
    )
    try:
        futures = {pool.submit(_task, n, shards[n]): n for n in left}
        for future in as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool:
        raise PhiError(
            f"{out}: a worker was killed, perhaps for want of memory; the same command goes on, "
            "with fewer --workers it needs less"
        ) from None
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


_RUNNER: list[tuple[ShardRunner, Pass, Path]] = []  # of this process


def _prepare(config: DataConfig, which: Pass, out: Path, parent: int | None = None) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process for each core is there already
    if parent is not None:
        when_orphaned(parent, lambda: os._exit(1))  # it would wait for ever
    _RUNNER[:] = [(ShardRunner(config, which, out), which, out)]


def _task(number: int, shard: list[Slice]) -> Record:
    ((runner, which, out),) = _RUNNER
    left_out = None
    if which.number:
        bits = np.load(out / "work" / f"{which.number - 1}-duplicates.npy", mmap_mode="r")
        starts = np.load(out / "work" / f"{which.number - 1}-starts.npy")
        left_out = np.asarray(bits[starts[number] : starts[number + 1]])
    return runner.run(number, shard, left_out)


def _find_duplicates(out: Path, which: Pass, shards: int) -> None:
    assert which.minhash is not None
    work, target = out / "work", out / "work" / f"{which.number}-duplicates.npy"
    if target.is_file():
        return
    parts = [
        np.memmap(path, np.uint64, "r").reshape(-1, which.minhash.buckets)
        if (path := work / f"{which.number}-{n:05d}.sig").stat().st_size
        else np.zeros((0, which.minhash.buckets), np.uint64)
        for n in range(shards)
    ]
    _save(work / f"{which.number}-starts.npy", np.cumsum([0, *map(len, parts)]))
    _save(target, duplicates(parts))


def _save(path: Path, array: np.ndarray) -> None:
    raw = BytesIO()
    np.save(raw, array, allow_pickle=False)
    write_file(path, raw.getvalue())


def _funnel(asked: Run, records: list[list[Record]], shards: int) -> Funnel:
    steps = []
    for of_pass in records:
        total = [StepCount(s.name) for s in of_pass[0].steps]
        for record in of_pass:
            for whole, part in zip(total, record.steps, strict=True):
                whole.merge(part)
        steps += total
    unreadable: dict[str, int] = {}
    for record in records[0]:
        for why, count in record.unreadable.items():
            unreadable[why] = unreadable.get(why, 0) + count
    return Funnel(
        fingerprint=asked.fingerprint(),
        files=len(asked.files),
        shards=shards,
        read=sum(r.read for r in records[0]),
        unreadable=unreadable,
        unreadable_first=[said for r in records[0] for said in r.unreadable_first][:10],
        steps=steps,
        documents=sum(r.documents for r in records[-1]),
        tokens=sum(r.tokens for r in records[-1]),
        heldout_tokens=sum(r.heldout_tokens for r in records[-1]),
    )


def _finish(asked: Run, out: Path, funnel: Funnel, shards: int) -> None:
    if not funnel.read:
        said = f", such as {funnel.unreadable_first[0]}" if funnel.unreadable_first else ""
        raise UsageError(f"{', '.join(asked.config.input)}: none of the records is a document{said}")
    if asked.config.tokenizer is not None:
        if not funnel.tokens or not funnel.heldout_tokens:
            raise UsageError(
                f"{out}: {funnel.documents:,} documents are left, too few to train on some and hold 4 % out; give "
                "more, or leave the tokenizer out, and begin anew with --force"
            )
        encoder, _ = open_encoder(Path(asked.config.tokenizer))
        for suffix in ("bin", "txt"):
            with open(out / "shards" / f"heldout.{suffix}", "wb") as whole:
                for n in range(shards):
                    with open(out / "work" / f"heldout-{n:05d}.{suffix}", "rb") as part:
                        shutil.copyfileobj(part, whole)
                whole.flush()
                os.fsync(whole.fileno())
        train = [p.name for p in sorted((out / "shards").glob("train-*.bin")) if p.stat().st_size]
        write_file(out / "shards" / INDEX, index_text(out / "shards", train, encoder, Path(asked.config.tokenizer)))
    write_file(out / "funnel.html", page(funnel))
    write_file(out / "funnel.json", encode(funnel))
