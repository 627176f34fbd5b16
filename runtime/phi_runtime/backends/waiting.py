"""How long the threads of an engine spin before they sleep, while they wait for each other.

A thread that spins takes the processor from the very thread that it waits for, where another process is busy too; one
that sleeps is woken late. A short spin has nearly all of both. What was measured: docs/explanation/busy-machine.md.
A user's own setting is left alone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_SPINS = "GOMP_SPINCOUNT"  # read when GCC's OpenMP library is loaded
_SAME_MATTER = ("OMP_WAIT_POLICY", "KMP_BLOCKTIME")
LLAMA_CPP, TORCH = "300", "1000"  # iterations
ONNXRUNTIME = "10"  # microseconds; "" for its own choice


_ours: str | None = None  # what `spin_briefly` set


@contextmanager
def short_spins(count: str) -> Iterator[None]:
    """A library that brings OpenMP and is imported within it spins `count` times."""
    if _is_set_by_user():
        yield
        return
    before = os.environ.get(_SPINS)
    os.environ[_SPINS] = count
    try:
        yield
    finally:
        if before is None:
            del os.environ[_SPINS]
        else:
            os.environ[_SPINS] = before


def spin_briefly(count: str) -> None:
    """The same for all that this process and its children will import."""
    global _ours
    if not _is_set_by_user():
        os.environ[_SPINS] = _ours = count


def _is_set_by_user() -> bool:
    return os.environ.get(_SPINS) not in (None, _ours) or any(name in os.environ for name in _SAME_MATTER)
