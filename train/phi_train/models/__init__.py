"""The family's architectures in PyTorch, one module each, named as Hugging Face's `model_type`."""

from typing import Any

from phi_runtime.config import Config, GptNeoConfig, Phi3Config, Phi3SmallConfig, PhiConfig
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
