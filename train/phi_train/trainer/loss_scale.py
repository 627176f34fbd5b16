"""float16's loss scaling, the same under every ZeRO stage: gradients are unscaled as they are born, in float32, and a
step in which one overflowed changes nothing (arXiv:1710.03740).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

BEGIN = 2.0**16
_RAISE_AFTER = 1000  # steps without overflow
_LEAST, _MOST = 1.0, 2.0**24


class LossScale:
    """The factor by which the loss is multiplied, and how many steps have gone well under it."""

    def __init__(self, model: nn.Module, device: torch.device) -> None:
        self.scale, self.good = BEGIN, 0
        self._overflow = torch.zeros((), dtype=torch.bool, device=device)
        for p in filter(lambda p: p.requires_grad, model.parameters()):
            p.register_hook(self._unscale)  # type: ignore[no-untyped-call]

    def _unscale(self, gradient: Tensor) -> Tensor:
        gradient = gradient.float() / self.scale
        finite = gradient.isfinite()
        self._overflow |= ~finite.all()
        return torch.where(finite, gradient, 0)

    def overflowed(self) -> bool:
        """Whether any gradient of this process did since it was last asked."""
        found = bool(self._overflow)
        self._overflow.zero_()
        return found

    def adapt(self, overflow: bool) -> None:
        """Choose the next step's factor."""
        if overflow:
            self.scale, self.good = max(_LEAST, self.scale / 2), 0
            return
        self.good += 1
        if self.good >= _RAISE_AFTER:
            self.scale, self.good = min(_MOST, 2 * self.scale), 0


@contextmanager
def nothing_learnt(optimizer: Any) -> Iterator[None]:
    """Within, a step of the optimizer leaves weights and moments as they are."""
    kept = [{k: group[k] for k in ("lr", "betas", "weight_decay")} for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group.update(lr=0.0, betas=(1 - 1e-15, 1 - 1e-15), weight_decay=0.0)
    try:
        yield
    finally:
        for group, values in zip(optimizer.param_groups, kept, strict=True):
            group.update(values)
