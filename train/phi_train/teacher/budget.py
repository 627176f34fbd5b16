"""What asking a teacher may cost."""

from dataclasses import dataclass
from math import isfinite

from phi_runtime.errors import UsageError


@dataclass(frozen=True)
class Usage:
    """Tokens read and written."""

    prompt: int
    completion: int


class Budget:
    """tokens: read and written, at most. dollars: at most, by prices per million tokens. None for no limit.

    A request reserves the most that it can cost before it is sent, so that a limit is never passed, and settles what it
    did cost; one whose cost never came to be known keeps the most. Not safe between threads by itself.
    """

    def __init__(
        self, tokens: int | None = None, dollars: float | None = None, prices: tuple[float, float] = (0.0, 0.0)
    ) -> None:
        if not all(isfinite(p) and p >= 0 for p in prices):
            raise UsageError("prices are dollars per million tokens, 0 or more; correct --prices")
        if dollars is not None and not (isfinite(dollars) and dollars > 0):
            raise UsageError("a budget in dollars is more than 0; correct --budget-dollars")
        if dollars is not None and not any(prices):
            raise UsageError("a budget in dollars needs the prices per million tokens; give --prices IN,OUT")
        self._tokens, self._dollars, self._prices = tokens, dollars, prices
        self.tokens = 0
        self.dollars = 0.0

    def reserve(self, most: Usage) -> None:
        """Before a request. Raises UsageError where it might pass a limit."""
        tokens, dollars = self._cost(most)
        if self._tokens is not None and self.tokens + tokens > self._tokens:
            raise UsageError(
                f"the budget of {self._tokens:,} tokens does not hold another request ({self.tokens:,} used, up to "
                f"{tokens:,} more); the same command with a larger one goes on"
            )
        if self._dollars is not None and self.dollars + dollars > self._dollars:
            raise UsageError(
                f"the budget of ${self._dollars:.2f} does not hold another request (${self.dollars:.4f} used, up to "
                f"${dollars:.4f} more); the same command with a larger one goes on"
            )
        self.spend(most)

    def settle(self, most: Usage, used: Usage) -> None:
        """After a request that was reserved."""
        self.spend(Usage(used.prompt - most.prompt, used.completion - most.completion))

    def spend(self, used: Usage) -> None:
        """Without asking."""
        tokens, dollars = self._cost(used)
        self.tokens += tokens
        self.dollars += dollars

    def _cost(self, usage: Usage) -> tuple[int, float]:
        read, written = self._prices
        return usage.prompt + usage.completion, (usage.prompt * read + usage.completion * written) / 1e6
