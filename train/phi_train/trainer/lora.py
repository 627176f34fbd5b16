"""LoRA (arXiv:2106.09685): a checkpoint stays as it is, and every matrix of its layers learns a difference of low rank.

Shapes: O rows and I columns of a matrix, R the rank.
"""

import json
import math
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch.nn import functional

from phi_runtime.files import write_file
from phi_train.models import CausalLM
from phi_train.recipes.config import Recipe
from phi_train.trainer.packed import pack, packed_linear

ADAPTER = "adapter"  # the folder beside the merged checkpoint
_PARTS = ("lora_A", "lora_B")


def enable_lora(model: CausalLM, rank: int, alpha: float, seed: int, base: str | None = None) -> None:
    """Freeze all weights, and give each linear layer but the head a pair lora_A [R, I], lora_B [O, R].

    It adds alpha / R * B A to the layer's matrix; B is zero at the beginning, A drawn. base: the grid of four bits that
    the layer's own weights are packed to, None for as they are.
    """
    model.requires_grad_(False)
    draw = torch.Generator().manual_seed(seed)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            rows, columns = module.weight.shape
            reach = 1 / math.sqrt(columns)
            first = torch.empty(rank, columns).uniform_(-reach, reach, generator=draw)
            module.register_parameter("lora_A", nn.Parameter(first))
            module.register_parameter("lora_B", nn.Parameter(torch.zeros(rows, rank)))
            packed = base is not None and pack(module, base)
            module.forward = partial(_linear, module, alpha / rank, packed)  # type: ignore[method-assign]


def _linear(module: nn.Linear, scale: float, packed: bool, x: Tensor) -> Tensor:
    found = packed_linear(module, x) if packed else functional.linear(x, module.weight, module.bias)
    low = functional.linear(functional.linear(x, module.lora_A), module.lora_B)  # type: ignore[arg-type]
    return found + scale * low


def merge(weights: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """All weights [O, I] with their differences in them, in float32."""
    found = {name: w for name, w in weights.items() if not name.endswith(_PARTS)}
    for name in weights:
        module, _, part = name.rpartition(".")
        if part == "lora_A":
            difference = weights[f"{module}.lora_B"].float() @ weights[name].float()
            found[f"{module}.weight"] = found[f"{module}.weight"].float() + scale * difference
    return found


def write_adapter(out: Path, weights: dict[str, Tensor], r: Recipe) -> None:
    """The folder that PEFT's `save_pretrained` writes, adapter_config.json last."""
    pairs = {name: w for name, w in weights.items() if name.endswith(_PARTS)}
    write_file(
        out / "adapter_model.safetensors",
        save({f"base_model.model.{name}.weight": w.contiguous() for name, w in pairs.items()}, {"format": "pt"}),
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": r.init_from,
        "r": r.objective.lora_rank,
        "lora_alpha": r.objective.lora_alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.split(".")[-2] for name in pairs}),
        "inference_mode": True,
    }
    write_file(out / "adapter_config.json", json.dumps(config, indent=1) + "\n")
