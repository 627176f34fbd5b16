"""What a process holds of what is learnt: of each parameter a flat piece of the weights and the optimizer's moments.

ZeRO's stages divide tensors each in their own way, among any number of processes; a piece says where in the whole,
flattened tensor it begins, so that any division is put together from any other.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_local_fp32_param,
    safe_get_local_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
)
from torch import Tensor, distributed

from phi_train.trainer.engine import Ranks

WEIGHT = "weight"
_MOMENTS = ("exp_avg", "exp_avg_sq")

# Values [start, start + count) of a flattened tensor: (parameter's name, WEIGHT or a moment's name, start, count).
Read = Callable[[str, str, int, int], Tensor]


def fragments(engine: Any, ranks: Ranks) -> Iterator[tuple[str, str, int, Tensor]]:
    """(parameter's name, part, where it begins, float32 values): each value of all processes' once."""
    _begin(engine, 0)
    for name, p in _learnt(engine):
        start, count = _place(engine, p, ranks)
        first = start if _plain(engine) else 0
        if count:
            for part in (WEIGHT, *_MOMENTS):
                yield name, part, start, _held(engine, p, part)[first : first + count]


@torch.no_grad()
def restore(engine: Any, ranks: Ranks, step: int, read: Read) -> None:
    """Give every process its own pieces, and all the weights, which the first one reads; all processes call it."""
    _begin(engine, step, again=True)
    for name, p in _learnt(engine):
        with GatheredParameters(p, modifier_rank=0, enabled=_divided(p)):
            if ranks.first:
                p.copy_(read(name, WEIGHT, 0, p.numel()).view_as(p))
        if ranks.world > 1 and not _divided(p):
            distributed.broadcast(p.data, 0)
        if _plain(engine):
            for part in _MOMENTS:  # every process has them whole
                _held(engine, p, part).copy_(read(name, part, 0, p.numel()))
            continue
        start, count = _place(engine, p, ranks)
        for part in (WEIGHT, *_MOMENTS) if count else ():
            values = read(name, part, start, count)
            if not _divided(p):
                _held(engine, p, part).copy_(values)
                continue
            filled = torch.zeros(p.ds_tensor.numel(), device=engine.device)
            filled[:count] = values
            if part == WEIGHT:
                safe_set_local_fp32_param(p, filled)
            else:
                safe_set_local_optimizer_state(p, filled, part)


def full_weights(engine: Any, ranks: Ranks) -> dict[str, Tensor]:
    """All weights in float32, whole, on the first process and none on the others; all processes call it."""
    found = {}
    for name, p in engine.module.named_parameters():
        whole = safe_get_full_fp32_param(p) if p.requires_grad and not _plain(engine) else p
        if ranks.first:
            found[name] = whole.detach().to("cpu", torch.float32).contiguous()
    return found


def _learnt(engine: Any) -> Iterator[tuple[str, Any]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _place(engine: Any, p: Any, ranks: Ranks) -> tuple[int, int]:
    """Where the piece begins that this process is to save, and how many values it has."""
    if _plain(engine) or _divided(p):
        whole = p.numel() if _plain(engine) else p.ds_numel
        each = -(-whole // ranks.world) if _plain(engine) else p.partition_numel()
        start = min(whole, each * ranks.rank)
        return start, min(each, whole - start)
    piece = p._hp_mapping
    return (0, 0) if piece is None else (piece.lp_fragment_address.start, piece.lp_fragment_address.numel)


def _held(engine: Any, p: Any, part: str) -> Tensor:
    """What lies here of a part, flat: all of it where nothing divides it, under stage 3 filled up at the end."""
    if _plain(engine):
        whole: Tensor = p if part == WEIGHT else _optimizer(engine).state[p][part]
        return whole.detach().view(-1)
    if _divided(p):
        own = safe_get_local_fp32_param(p) if part == WEIGHT else safe_get_local_optimizer_state(p, part)
        assert own is not None
        flat: Tensor = own.flatten()
        return flat
    piece: Tensor = p._hp_mapping.get_hp_fragment(None if part == WEIGHT else part)
    return piece


def _begin(engine: Any, step: int, again: bool = False) -> None:
    """Give the optimizer the state that its own first step would make."""
    optimizer = _optimizer(engine)
    parameters = _stepped(engine)
    for p in parameters:
        if again or not optimizer.state.get(p):
            made = {part: torch.zeros_like(p) for part in _MOMENTS}
            optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **made}
    if not _plain(engine) and hasattr(engine.optimizer, "bit16_groups"):  # stages 1 and 2 find a parameter's part by it
        for group, p in zip(engine.optimizer.bit16_groups, parameters, strict=True):
            lazy_init_hp_params_optimizer_state(group, p, optimizer.state)


def _stepped(engine: Any) -> list[Tensor]:
    """What the optimizer steps on: the parameters, or ZeRO's partitions of them."""
    if _plain(engine):
        return [p for _, p in _learnt(engine)]
    zero = engine.optimizer
    parts = "fp32_partitioned_groups_flat" if hasattr(zero, "fp32_partitioned_groups_flat") else ""
    return list(getattr(zero, parts or "single_partition_of_fp32_groups"))


def _divided(p: Any) -> bool:
    """Whether ZeRO's stage 3 divides the weights themselves."""
    return hasattr(p, "ds_id")


def _plain(engine: Any) -> bool:
    """Whether the optimizer holds the model's own parameters, whole."""
    return isinstance(engine.optimizer, torch.optim.Optimizer)


def _optimizer(engine: Any) -> torch.optim.Optimizer:
    found: torch.optim.Optimizer = engine.optimizer if _plain(engine) else engine.optimizer.optimizer
    return found
