"""How much memory this process may still take: what the machine has left, and what a cgroup (a container) allows."""

import os
import re
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/sys/fs/cgroup")
_UNLIMITED = 1 << 60  # version 1 says a number near 2**63


def available() -> int:
    """Bytes. Pages of files do not count as taken: the kernel gives them back when they are needed."""
    limit = group_limit()
    return _machine() if limit is None else min(_machine(), limit)


def group_limit() -> int | None:
    """Bytes that the cgroup of this process leaves it, what it holds already included; None without a limit. A process
    that passes it is killed.
    """
    return min((max(0, limit - others) for limit, others in _groups()), default=None)


def _machine() -> int:
    text = _text(Path("/proc/meminfo"))
    if (said := re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)) is not None:
        return int(said[1]) * 1024
    return int(0.75 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _groups() -> Iterator[tuple[int, int]]:
    """The limit of each cgroup that this process is in, and what others in it hold, bytes."""
    own = re.search(r"^RssAnon:\s+(\d+) kB", _text(Path("/proc/self/status")), re.MULTILINE)
    mine = int(own[1]) * 1024 if own else 0
    for line in _text(Path("/proc/self/cgroup")).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = _CGROUPS / controllers
        limit_file, held = ("memory.limit_in_bytes", "total_rss") if controllers else ("memory.max", "anon")
        # In a container the group's own path may not be visible; its root then is the group.
        inside = root / path.lstrip("/")
        for folder in (inside, *inside.parents):
            if not folder.is_relative_to(root):
                break
            said = _text(folder / limit_file).strip()
            if said.isdigit() and int(said) < _UNLIMITED:
                taken = re.search(rf"^{held} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
                yield int(said), max(0, (int(taken[1]) if taken else 0) - mine)


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
