"""What figures were measured on."""

import os
import platform
from pathlib import Path
from typing import Any

from phi_runtime.backends import cores
from phi_runtime.version import __version__


def machine() -> dict[str, Any]:
    """What the figures were measured on; nothing that names one particular machine."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        cpu = next(
            (x.split(":", 1)[1].strip() for x in info.read_text().splitlines() if x.startswith("model name")), cpu
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu,
        "architecture": platform.machine(),
        "cores": cores(),
        "memory_bytes": memory,
        "system": platform.system(),
        "python": platform.python_version(),
        "phi_edge": __version__,
    }
