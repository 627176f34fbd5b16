"""A training batch, whatever the objective, and the order of batches.

Shapes: N units of a batch, R texts of a unit (one, or a preferred and a rejected one), T tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """tokens [N, R, T]: ids. loss_mask [N, R, T]: the tokens whose prediction counts, None for all but the first.
    documents [N, R, T]: number of the document of each token, None where documents are not kept apart.
    """

    tokens: Tensor
    loss_mask: Tensor | None = None
    documents: Tensor | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, part: slice) -> "Batch":
        return Batch(*(None if t is None else t[part] for t in self._fields()))  # type: ignore[arg-type]

    def to(self, device: torch.device) -> "Batch":
        """The same on a device."""
        return Batch(*(None if t is None else t.to(device) for t in self._fields()))  # type: ignore[arg-type]

    def split(self, size: int) -> Iterator["Batch"]:
        """Parts of up to `size` units."""
        for start in range(0, len(self), size):
            yield self[start : start + size]

    @property
    def count(self) -> int:
        """Tokens in the loss."""
        if self.loss_mask is None:
            return len(self) * self.tokens.shape[1] * (self.tokens.shape[2] - 1)
        return int(self.loss_mask[..., 1:].sum())

    def _fields(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        return self.tokens, self.loss_mask, self.documents


class BatchStream(Protocol):
    """Where batches come from; each a function of its number alone, so that a continued run sees what an unbroken
    one would.
    """

    def batch(self, number: int) -> Batch:
        """Batch number `number`, the same in every process."""

    def heldout(self) -> Batch:
        """What the run is evaluated on."""

    def unigram_loss(self) -> float | None:
        """Of the held-out tokens, nats, to compare with; None where that says nothing."""


class Order:
    """In which order the windows of each epoch are taken."""

    def __init__(self, count: int, seed: int) -> None:
        self._count, self._seed = count, seed
        self._known: dict[int, np.ndarray] = {}

    def take(self, number: int, size: int) -> list[int]:
        """The windows of batch `number`."""
        places = [divmod(n, self._count) for n in range(number * size, (number + 1) * size)]
        needed = {epoch for epoch, _ in places}
        self._known = {
            epoch: self._known[epoch]
            if epoch in self._known
            else np.random.default_rng([self._seed, epoch]).permutation(self._count)
            for epoch in needed
        }
        return [int(self._known[epoch][place]) for epoch, place in places]
