"""The state of a run: what is learnt, optimizer and random numbers in safetensors, counters in JSON; never pickle.

Each state is a folder `step-00000100` that appears whole, with the digest of its files; the newest one whose digests
hold is the one continued from. Tensors are whole whatever ZeRO divided them into, so a run goes on with any number
of processes.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    lazy_init_hp_params_optimizer_state,
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
)
from safetensors.torch import load_file, save
from torch import Tensor

from phi_runtime.architecture.config import read_json
from phi_runtime.errors import CheckpointError
from phi_runtime.files import sha256, staged_folder
from phi_train.trainer.engine import Ranks, barrier

KEEP = 2
_FILES = ("model.safetensors", "optimizer.safetensors", "random.safetensors")
_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Counters:
    """How far a run is: steps done, the seconds they took, the batches that were left out, float16's loss scale, and
    the last steps' losses.
    """

    step: int = 0
    seconds: float = 0.0
    skipped: tuple[int, ...] = ()
    scale: float = 0.0
    good: int = 0
    recent: tuple[float, ...] = ()


def save_state(folder: Path, counters: Counters, engine: Any, ranks: Ranks) -> None:
    """Save the state, then delete all but the newest two. All processes call it; the first one writes."""
    weights, moments = dict(_weights(engine)), dict(_moments(engine))
    if ranks.first:
        numbers = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_available():
            numbers["cuda"] = torch.cuda.get_rng_state()
        with staged_folder(folder / f"step-{counters.step:08d}") as stage:
            for name, tensors in zip(_FILES, (weights, moments, numbers), strict=True):
                (stage / name).write_bytes(save(tensors))
            digests = {name: sha256(stage / name) for name in _FILES}
            said = {**asdict(counters), "sha256": digests}
            (stage / "state.json").write_text(json.dumps(said | {"self": _digest(said)}) + "\n")
        for old in sorted(folder.glob("step-*"))[:-KEEP]:
            shutil.rmtree(old)
    barrier()


def load_state(folder: Path, engine: Any) -> Counters:
    """Restore the newest valid state; where there is none, nothing is changed."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        counters = _read_valid(candidate)
        if counters is None:
            continue
        weights, moments, numbers = (load_file(candidate / name) for name in _FILES)
        _restore(engine, weights, moments, counters.step)
        torch.set_rng_state(numbers["cpu"])
        if "cuda" in numbers and torch.cuda.is_available():
            torch.cuda.set_rng_state(numbers["cuda"])
        return counters
    return Counters()


def full_weights(engine: Any) -> dict[str, Tensor]:
    """All weights in float32, whole; all processes call it."""
    still = {n: p.detach().to("cpu", torch.float32) for n, p in engine.module.named_parameters() if not p.requires_grad}
    return still | dict(_weights(engine))


def _learnt(engine: Any) -> Iterator[tuple[str, Tensor]]:
    return ((name, p) for name, p in engine.module.named_parameters() if p.requires_grad)


def _weights(engine: Any) -> Iterator[tuple[str, Tensor]]:
    for name, p in _learnt(engine):
        whole = p if _plain(engine) else safe_get_full_fp32_param(p)
        yield name, whole.detach().to("cpu", torch.float32).contiguous()


def _moments(engine: Any) -> Iterator[tuple[str, Tensor]]:
    _begin(engine, 0)
    for name, p in _learnt(engine):
        for part in _MOMENTS:
            whole = _optimizer(engine).state[p][part] if _plain(engine) else safe_get_full_optimizer_state(p, part)
            yield f"{name}|{part}", whole.detach().to("cpu", torch.float32).contiguous()


@torch.no_grad()
def _restore(engine: Any, weights: dict[str, Tensor], moments: dict[str, Tensor], step: int) -> None:
    _begin(engine, step, again=True)
    for name, p in _learnt(engine):
        with GatheredParameters(p, modifier_rank=0, enabled=hasattr(p, "ds_id")):  # ZeRO's stage 3 divides them too
            p.copy_(weights[name])
        if _plain(engine):
            for part in _MOMENTS:
                _optimizer(engine).state[p][part].copy_(moments[f"{name}|{part}"])
        else:
            safe_set_full_fp32_param(p, weights[name].to(engine.device))
            for part in _MOMENTS:
                safe_set_full_optimizer_state(p, moments[f"{name}|{part}"].to(engine.device), part)


def _begin(engine: Any, step: int, again: bool = False) -> None:
    """Give the optimizer the state that its own first step would make."""
    optimizer = _optimizer(engine)
    for p in _held(engine):
        if again or not optimizer.state.get(p):
            made = {part: torch.zeros_like(p) for part in _MOMENTS}
            optimizer.state[p] = {"step": torch.tensor(float(step), device=p.device), **made}
    if not _plain(engine) and hasattr(engine.optimizer, "bit16_groups"):  # stages 1 and 2 find a parameter's part by it
        for group, p in zip(engine.optimizer.bit16_groups, _held(engine), strict=True):
            lazy_init_hp_params_optimizer_state(group, p, optimizer.state)


def _held(engine: Any) -> list[Tensor]:
    """What the optimizer steps on: the parameters, or ZeRO's partitions of them."""
    if _plain(engine):
        return [p for _, p in _learnt(engine)]
    zero = engine.optimizer
    parts = "fp32_partitioned_groups_flat" if hasattr(zero, "fp32_partitioned_groups_flat") else ""
    return list(getattr(zero, parts or "single_partition_of_fp32_groups"))


def _plain(engine: Any) -> bool:
    """Whether the optimizer holds the model's own parameters, whole."""
    return isinstance(engine.optimizer, torch.optim.Optimizer)


def _optimizer(engine: Any) -> torch.optim.Optimizer:
    found: torch.optim.Optimizer = engine.optimizer if _plain(engine) else engine.optimizer.optimizer
    return found


def _read_valid(folder: Path) -> Counters | None:
    """The counters of a state whose files are what was written, else None."""
    try:
        said = read_json(folder / "state.json")
        whole = said.pop("self") == _digest(said) and all(
            sha256(folder / name) == said["sha256"][name] for name in _FILES
        )
        counters = Counters(
            step=int(said["step"]),
            seconds=float(said["seconds"]),
            skipped=tuple(int(n) for n in said["skipped"]),
            scale=float(said["scale"]),
            good=int(said["good"]),
            recent=tuple(float(x) for x in said["recent"]),
        )
    except (CheckpointError, OSError, KeyError, TypeError, ValueError):
        return None
    return counters if whole else None


def _digest(said: dict[str, Any]) -> str:
    """Of what state.json says, itself left out."""
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()
