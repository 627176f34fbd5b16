"""`model_type: llama` and `mistral`: what Unsloth and others save a Phi-3, Phi-3.5 or Phi-4 as.

The same function in another layout: queries, keys and values, gate and up projection as matrices of their own. It is
read as phi3, whose fused matrices are made of these rows.
"""

from typing import Any

from phi_runtime.architecture.families import phi3
from phi_runtime.architecture.families.fields import Fields
from phi_runtime.architecture.families.phi3 import Phi3Config
from phi_runtime.errors import UnsupportedError


def parse_llama(f: Fields) -> Phi3Config:
    """The configuration of a Llama's `config.json` as a phi3's, checked. A window is none of Llama's fields."""
    return _parse(f, rms_norm_eps=1e-6, sliding_window=None)


def parse_mistral(f: Fields) -> Phi3Config:
    """The same of a Mistral's, whose window and key-value heads have defaults of their own."""
    defaults = {"sliding_window": 4096, "num_key_value_heads": 8}
    return _parse(f, rms_norm_eps=1e-6, **{name: f.raw.get(name, value) for name, value in defaults.items()})


def _parse(f: Fields, rms_norm_eps: float, **fields: Any) -> Phi3Config:
    f.expect("mlp_bias", False)
    if f.partial_rotary_factor(1.0) != 1:
        raise UnsupportedError(f"{f.path}: partial_rotary_factor is a field that {f.raw['model_type']} does not have")
    f = Fields(f.raw | {"rms_norm_eps": f.get("rms_norm_eps", rms_norm_eps)} | fields, f.path)
    config = phi3.parse(f)
    f.expect("head_dim", config.head_dim)
    return config


def parts(config: Phi3Config) -> dict[str, tuple[tuple[str, int], ...]]:
    """Of each fused matrix, the stored ones that its rows are, in order, and how many each has."""
    kv, found = config.num_key_value_heads * config.head_dim, {}
    for n in range(config.num_hidden_layers):
        attention, mlp = f"model.layers.{n}.self_attn.", f"model.layers.{n}.mlp."
        found[attention + "qkv_proj.weight"] = tuple(
            (f"{attention}{name}_proj.weight", rows) for name, rows in (("q", config.hidden_size), ("k", kv), ("v", kv))
        )
        found[mlp + "gate_up_proj.weight"] = tuple(
            (f"{mlp}{name}_proj.weight", config.intermediate_size) for name in ("gate", "up")
        )
    return found
