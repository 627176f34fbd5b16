"""The state of a run on disk: weights and optimizer in safetensors, counters in JSON; never pickle.

Each state is a folder `step-00000100` that appears whole, with the digest of its files; the
newest one whose digests hold is the one continued from.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from phi_runtime.config import read_json
from phi_runtime.errors import CheckpointError
from phi_runtime.files import sha256, staged_folder

_KEEP = 2
_FILES = ("model.safetensors", "optimizer.safetensors")


def save_state(folder: Path, step: int, seconds: float, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Save the state after `step` steps, then delete all but the newest two."""
    names = {id(p): name for name, p in model.named_parameters()}
    moments: dict[str, Tensor] = {}
    for parameter, values in optimizer.state.items():
        for key, value in values.items():
            moments[f"{names[id(parameter)]}|{key}"] = torch.as_tensor(value).contiguous()
    with staged_folder(folder / f"step-{step:08d}") as stage:
        weights = {n: p.detach().contiguous() for n, p in model.named_parameters()}
        for name, tensors in zip(_FILES, (weights, moments), strict=True):
            (stage / name).write_bytes(save(tensors))
        digests = {name: sha256(stage / name) for name in _FILES}
        (stage / "state.json").write_text(json.dumps({"step": step, "seconds": seconds, "sha256": digests}) + "\n")
    for old in sorted(folder.glob("step-*"))[:-_KEEP]:
        shutil.rmtree(old)


def load_state(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[int, float]:
    """Restore the newest valid state; the steps done and the seconds they took, or (0, 0)."""
    for candidate in sorted(folder.glob("step-*"), reverse=True):
        counters = _read_valid(candidate)
        if counters is None:
            continue
        weights, moments = (load_file(candidate / name) for name in _FILES)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(weights[name])
        by_parameter: dict[str, dict[str, Tensor]] = {}
        for key, value in moments.items():
            name, _, part = key.rpartition("|")
            by_parameter.setdefault(name, {})[part] = value
        for name, parameter in model.named_parameters():
            moved = {part: value.to(parameter.device) for part, value in by_parameter.get(name, {}).items()}
            optimizer.state[parameter] = moved
        return int(counters["step"]), float(counters["seconds"])
    return 0, 0.0


def _read_valid(folder: Path) -> dict[str, Any] | None:
    """The counters of a state whose files are what was written, else None."""
    try:
        counters = read_json(folder / "state.json")
        whole = all(sha256(folder / name) == counters["sha256"][name] for name in _FILES)
    except (CheckpointError, OSError, KeyError, TypeError):
        return None
    return counters if whole else None
