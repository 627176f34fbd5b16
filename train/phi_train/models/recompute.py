"""Activations that a layer's backward pass computes again, in place of keeping them.

Whole layers (arXiv:1604.06174) cost a third more arithmetic. Selectively (arXiv:2205.05198) the products with weights
and flash attention are kept, and what is cheap is computed again: norms, rotations, the gate, attention's weights
where they exist. Shapes: B batch, T tokens, E hidden_size.
"""

from abc import ABC, abstractmethod
from collections import deque
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from phi_runtime.architecture.decoder import Layer
from phi_train.models.attention import AttentionContext

Again = bool | Literal["selective"]

_KEPT = {
    "aten::mm",
    "aten::addmm",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
}
_FLASH = ("torch_attn::", "flash_attn")  # of PyTorch and of the packages flash-attn 2, 3 and 4


class DecoderLayer(nn.Module, ABC):
    """A layer of a model. again: what of its inside the backward pass computes again.

    That is decided in here, not around the layer, so that torch.compile sees it.
    """

    again: Again = False

    @abstractmethod
    def inside(self, x_BTE: Tensor, layer: Layer, context: AttentionContext) -> Tensor:
        """The layer itself."""

    def forward(self, x_BTE: Tensor, layer: Layer, context: AttentionContext) -> Tensor:
        """One layer."""
        if not self.again or not torch.is_grad_enabled():
            return self.inside(x_BTE, layer, context)
        context.prepare(x_BTE, layer)

        def inside(x_BTE: Tensor) -> Tensor:
            return self.inside(x_BTE, layer, context)

        if self.again is True:
            out: Tensor = checkpoint(inside, x_BTE, use_reentrant=False)
        elif torch.compiler.is_compiling():
            out = checkpoint(inside, x_BTE, use_reentrant=False, context_fn=_for_a_compiler)
        else:
            out = checkpoint(inside, x_BTE, use_reentrant=False, context_fn=_contexts)
        return out


def _is_kept(operation: Any) -> bool:
    name: str = operation.name()
    return name in _KEPT or name.startswith(_FLASH)


class _Keep(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps what the operations give that are not to be computed again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: deque[Any] = deque()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = operation(*args, **(kwargs or {}))
        if _is_kept(operation):
            self.found.append((operation, tree_map_only(Tensor, Tensor.detach, out)))
        return out


class _Give(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives it back, in the same order.

    PyTorch's own contexts want every operation to come again as it came, and ZeRO's stage 3 gathers otherwise.
    """

    def __init__(self, kept: _Keep) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._kept = kept

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not _is_kept(operation):
            return operation(*args, **(kwargs or {}))
        its, out = self._kept.found.popleft()
        assert its is operation, (its, operation)
        return out


def _contexts() -> tuple[_Keep, _Give]:
    kept = _Keep()
    return kept, _Give(kept)


def _policy(ctx: Any, operation: Any, *args: Any, **settings: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if _is_kept(operation) else CheckpointPolicy.PREFER_RECOMPUTE


_for_a_compiler = partial(create_selective_checkpoint_contexts, _policy)  # torch.compile knows this one


def recompute(model: nn.Module, again: Again) -> None:
    """Set `again` of all layers of a model."""
    for part in model.modules():
        if isinstance(part, DecoderLayer):
            part.again = again
