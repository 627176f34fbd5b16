"""How an engine's threads wait for each other: asleep, so that a busy machine does not slow them many times over.

A thread that spins while it waits takes the processor from the very thread that it waits for. What was measured stands
in docs/explanation/busy-machine.md. A user's own setting is left alone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

_OPENMP = "OMP_WAIT_POLICY"
SLEEP = {_OPENMP: "PASSIVE"}  # read when OpenMP's library is loaded


@contextmanager
def sleeping_threads() -> Iterator[None]:
    """Within it, a library that brings OpenMP is imported with threads that sleep while they wait."""
    if any(name in os.environ for name in (_OPENMP, "GOMP_SPINCOUNT", "KMP_BLOCKTIME")):
        yield
        return
    os.environ.update(SLEEP)
    try:
        yield
    finally:
        for name in SLEEP:
            os.environ.pop(name, None)
