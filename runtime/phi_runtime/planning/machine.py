"""Describe the machine that figures were measured on."""

import os
import platform
from pathlib import Path

from phi_runtime.backends import cores
from phi_runtime.contract import Contract, Count
from phi_runtime.version import __version__


class Machine(Contract, frozen=True):
    """A machine and its software; nothing that names one particular machine."""

    cpu: str
    architecture: str
    cores: Count
    memory_bytes: Count
    system: str
    python: str
    phi_edge: str


def machine() -> Machine:
    """This machine."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next(
            (x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu
        )
    return Machine(
        cpu=cpu,
        architecture=platform.machine(),
        cores=cores(),
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=platform.system(),
        python=platform.python_version(),
        phi_edge=__version__,
    )
