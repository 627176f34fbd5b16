"""Write large files in pieces on all cores; the bytes do not depend on the order in which pieces finish.

Every piece has its place before the first is written. A journal beside it names what is there,
so that an export that was interrupted goes on at the tensor where it stopped.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np

PIECE = 1 << 20  # weights of a piece, about; bounds the memory of one thread


class ParallelWriter:
    """The pool, the journal and the progress of one artifact's writing."""

    def __init__(self, journal: Path, threads: int, progress: Callable[[str], None]) -> None:
        self._journal = journal
        self._progress = progress
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads)
        self._done = set(self._journal.read_text().splitlines()) if self._journal.exists() else set()

    def close(self) -> None:
        """Stop the pool."""
        self._pool.shutdown()

    def forget(self) -> None:
        """Drop the journal, once the artifact is verified."""
        self._journal.unlink(missing_ok=True)

    def missing(self, name: str) -> bool:
        """Whether a tensor is still to be written; if it is there, progress is told so."""
        if name in self._done:
            self._progress(name)
            return False
        return True

    def done(self, name: str) -> None:
        """Note that all pieces of a tensor are written."""
        with open(self._journal, "a") as f:
            f.write(name + "\n")
        self._progress(name)

    def pieces(
        self, rows: int, columns: int, multiple: int, work: Callable[[int, int], None], weights: int = PIECE
    ) -> None:
        """Call work(start, stop) for all rows on the pool, in pieces of some `weights`, a multiple of rows each."""
        step = max(1, weights // columns // multiple) * multiple
        running: set[Future[None]] = set()
        try:
            for start in range(0, rows, step):
                if len(running) >= 2 * self._threads:
                    finished, running = wait(running, return_when=FIRST_COMPLETED)
                    for f in finished:
                        f.result()
                running.add(self._pool.submit(work, start, min(rows, start + step)))
            for f in running:
                f.result()
        finally:
            wait(running)

    @contextmanager
    def file(self, path: Path, size: int) -> Iterator["PlacedFile"]:
        """A file of `size` bytes to be filled in any order; what it holds already stays."""
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.ftruncate(descriptor, size)
            yield PlacedFile(descriptor)
        finally:
            os.close(descriptor)


class PlacedFile:
    """Writes at places; safe from several threads."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, offset: int, content: bytes | np.ndarray) -> None:
        """Write all of it at `offset`."""
        raw = content if isinstance(content, bytes) else content.tobytes()
        view = memoryview(raw)
        while view:
            count = os.pwrite(self._descriptor, view, offset)
            view, offset = view[count:], offset + count


def align(offset: int, multiple: int) -> int:
    """The next multiple."""
    return -(-offset // multiple) * multiple


def pad(f: BinaryIO, multiple: int) -> None:
    """Zeros up to the next multiple."""
    f.write(bytes(-f.tell() % multiple))
