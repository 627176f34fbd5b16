"""One check of a verification, and the type of its progress callback."""

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
