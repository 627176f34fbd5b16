"""Write the Hugging Face folder that training ends in."""

import json
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from phi_runtime.architecture.config import Config
from phi_runtime.files import write_file
from phi_runtime.text.tokenizer import Tokenizer
from phi_train.data.tokenizer import STOPS


def write_checkpoint(out: Path, config: Config, weights: dict[str, Tensor], tokenizer: Path) -> None:
    """Write weights as bfloat16, tokenizer and configs into `out`; config.json last, so that a
    folder that was interrupted is not taken for a checkpoint.
    """
    for name in ("tokenizer.json", "tokenizer_config.json"):
        write_file(out / name, (tokenizer / name).read_bytes())
    ids = [Tokenizer(tokenizer).id(token) for token in STOPS]
    generation = {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": [i for i in ids if i is not None],
        "pad_token_id": config.pad_token_id,
    }
    write_file(out / "generation_config.json", json.dumps(generation, indent=1) + "\n")
    rounded = {name: weights[name].detach().to(torch.bfloat16).contiguous() for name in config.tensor_shapes()}
    write_file(out / "model.safetensors", save(rounded, {"format": "pt"}))
    write_file(out / "config.json", json.dumps(config.to_json(), indent=1) + "\n")
