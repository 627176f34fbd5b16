"""How fast each type decodes: nanoseconds per weight, by engine, measured.

`phi-export calibrate-speed` measures the machine at hand; the table shipped here is the default and
says on what it was measured.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from phi_runtime.errors import UsageError
from phi_runtime.files import cache_folder

_SHIPPED = Path(__file__).with_name("speed.json")
T = TypeVar("T")


def calibrated_path() -> Path:
    """Where `calibrate-speed` keeps what it measured."""
    return cache_folder() / "speed.json"


@dataclass(frozen=True)
class Speeds:
    """Of one engine on one machine; `nanoseconds` per weight by type."""

    engine: str
    machine: str
    nanoseconds: Mapping[str, float]

    def milliseconds(self, matrices: list[tuple[str, int]]) -> float | None:
        """Time to multiply a vector with matrices (type, weights); None where a type was never measured."""
        if any(kind not in self.nanoseconds for kind, _ in matrices):
            return None
        return sum(self.nanoseconds[kind] * weights for kind, weights in matrices) / 1e6

    def fast(self, kinds: dict[str, T], than: list[str], margin: float) -> dict[str, T]:
        """Those that take at most `margin` times as long as the fastest of `than`; all, where nothing was measured."""
        known = {k: self.nanoseconds[k] for k in kinds if k in self.nanoseconds}
        limit = min((known[k] for k in than if k in known), default=None)
        return kinds if limit is None else {k: kinds[k] for k, ns in known.items() if ns <= margin * limit}


def load_speeds(engine: str) -> Speeds:
    """The table of this machine if `calibrate-speed` made one, otherwise the shipped one.

    Raises UsageError for a damaged table.
    """
    return _read(path if (path := calibrated_path()).is_file() else _SHIPPED, engine)


def measured_speeds(engine: str) -> Speeds | None:
    """The table that `calibrate-speed` made on this machine, None if it never ran. Raises UsageError."""
    path = calibrated_path()
    return _read(path, engine) if path.is_file() else None


def _read(path: Path, engine: str) -> Speeds:
    try:
        raw: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        table = {str(k): float(v) for k, v in raw["engines"].get(engine, {}).items()}
        return Speeds(engine, str(raw["machine"]), table)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UsageError(f"{path}: is not a table of speeds; delete it or run phi-export calibrate-speed") from None
