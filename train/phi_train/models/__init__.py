"""The family's architectures in PyTorch, one module each, named as Hugging Face's `model_type`."""

from typing import Any

import numpy as np
import torch

from phi_runtime.architecture.checkpoint import Checkpoint
from phi_runtime.architecture.config import Config, GptNeoConfig, Phi3Config, Phi3SmallConfig, PhiConfig
from phi_runtime.errors import UsageError
from phi_train.models.gpt_neo import GPTNeoForCausalLM
from phi_train.models.phi import PhiForCausalLM
from phi_train.models.phi3 import Phi3ForCausalLM
from phi_train.models.phi3small import Phi3SmallForCausalLM

CausalLM = Phi3ForCausalLM | PhiForCausalLM | GPTNeoForCausalLM | Phi3SmallForCausalLM

_CLASSES: dict[type, Any] = {
    Phi3Config: Phi3ForCausalLM,
    PhiConfig: PhiForCausalLM,
    GptNeoConfig: GPTNeoForCausalLM,
    Phi3SmallConfig: Phi3SmallForCausalLM,
}


def build(config: Config) -> CausalLM:
    """The model of a configuration, on the default device, its weights as PyTorch draws them."""
    model: CausalLM = _CLASSES[type(config)](config)
    return model


def load_model(checkpoint: Checkpoint) -> CausalLM:
    """A checkpoint's model."""
    model = build(checkpoint.config)
    load_weights(model, checkpoint)
    return model


def load_weights(model: CausalLM, checkpoint: Checkpoint) -> None:
    """Give a model a checkpoint's weights. Raises UsageError for one of another architecture."""
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    for name, shape in model.config.tensor_shapes().items():
        if shapes.get(name) != shape:
            raise UsageError(
                f"{checkpoint.folder}: {name} is {shapes.get(name)}, the recipe's model has {shape}; "
                "set model.… to its configuration"
            )
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(np.array(checkpoint.read(name))).view(p.shape))
