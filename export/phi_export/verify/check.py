"""One check of a verification, and how its progress is told."""

from collections.abc import Callable
from dataclasses import dataclass

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: the figure, the limit it is held to, and which part was worst."""

    name: str
    value: float
    limit: float
    where: str

    @property
    def passed(self) -> bool:
        """NaN fails."""
        return self.value <= self.limit
