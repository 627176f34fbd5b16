"""Ask Linux for pages of 2 MiB under a model's weights.

A token reads all of them, and with pages of 4 KiB the processor looks up many addresses on the way: with a model of
0.1 GB, a pass of llama.cpp takes 1.1 to 1.25 times as long.
"""

import ctypes
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_LEAST = 16 << 20  # bytes of a piece of memory that is worth it
# Beyond this the system may spend more time on finding such pages than a chat saves: with 1.8 GB, on a machine whose
# memory was full of cached files, 1.5 to 3 seconds of loading for 0 to 10 % of decoding.
_MOST = 1 << 30
_ADVICE = 14  # MADV_HUGEPAGE


def when_allocated(callback: Any) -> Any:
    """A progress callback of llama.cpp, made by its type `callback`, that asks for huge pages when the weights have
    their memory and nothing in it yet: then the pages are huge from the first, and nothing is copied. It has to live as
    long as the loading does.
    """
    before = set(_pieces())
    asked = False

    def progress(share: float, data: Any) -> bool:
        nonlocal asked
        if not asked:
            asked = True
            advise(lambda piece: piece not in before)
        return True

    return callback(progress)


def advise(wanted: Callable[[tuple[int, int]], bool] = lambda _: True) -> int:
    """Ask for huge pages under pieces of this process's own memory that are large; their bytes. A system that does not
    want to is left alone.
    """
    total = 0
    for start, end in _pieces():
        if _LEAST <= end - start <= _MOST and wanted((start, end)) and _madvise(start, end - start):
            total += end - start
    return total


def _madvise(start: int, size: int) -> bool:
    libc = ctypes.CDLL(None)
    return int(libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), _ADVICE)) == 0


def _pieces() -> Iterator[tuple[int, int]]:
    """Private writable memory of this process that belongs to no file."""
    if sys.platform != "linux":
        return
    for line in Path("/proc/self/maps").read_text().splitlines():
        where, rights, _, device, _, *name = line.split(maxsplit=5)
        if rights == "rw-p" and device == "00:00" and not name:
            start, end = where.split("-")
            yield int(start, 16), int(end, 16)
