"""`model_type: phi`: phi-1, phi-1.5 (arXiv:2306.11644, 2309.05463) and phi-2."""

from dataclasses import dataclass
from typing import Any

from phi_runtime.architecture.decoder import Decoder, Layer, Linear, Norm, Rope
from phi_runtime.architecture.families.fields import Fields
from phi_runtime.errors import CheckpointError

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class PhiConfig:
    """A Phi decoder: attention and MLP in parallel, partial rotary, biases on every linear."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    layer_norm_eps: float
    rope_theta: float
    partial_rotary_factor: float
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    model_type = "phi"
    sliding_window = None

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint, in the order of computation."""
        h, i, kv = self.hidden_size, self.intermediate_size, self.num_key_value_heads * self.head_dim
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, h)}

        def add(name: str, *weight: int) -> None:
            shapes[name + ".weight"], shapes[name + ".bias"] = weight, weight[:1]

        for n in range(self.num_hidden_layers):
            p = f"model.layers.{n}."
            add(p + "input_layernorm", h)
            for name, rows in zip(_PROJECTIONS, (h, kv, kv), strict=True):
                add(p + f"self_attn.{name}", rows, h)
            add(p + "self_attn.dense", h, h)
            add(p + "mlp.fc1", i, h)
            add(p + "mlp.fc2", h, i)
        add("model.final_layernorm", h)
        add("lm_head", self.vocab_size, h)
        return shapes

    def decoder(self) -> Decoder:
        """The model in the terms of all families."""

        def linear(*names: str) -> Linear:
            return Linear(tuple(n + ".weight" for n in names), tuple(n + ".bias" for n in names))

        return Decoder(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            context=self.max_position_embeddings,
            norm_eps=self.layer_norm_eps,
            activation="gelu_new",
            attention_scale=self.head_dim**-0.5,
            rope=Rope(self.rope_theta, int(self.head_dim * self.partial_rotary_factor)),
            embedding="model.embed_tokens.weight",
            positions=None,
            layers=tuple(
                Layer(
                    attention_norm=Norm(p + "input_layernorm.weight", p + "input_layernorm.bias"),
                    mlp_norm=None,
                    qkv=linear(*(p + f"self_attn.{name}" for name in _PROJECTIONS)),
                    o=linear(p + "self_attn.dense"),
                    up=linear(p + "mlp.fc1"),
                    down=linear(p + "mlp.fc2"),
                )
                for p in (f"model.layers.{n}." for n in range(self.num_hidden_layers))
            ),
            final_norm=Norm("model.final_layernorm.weight", "model.final_layernorm.bias"),
            head=linear("lm_head"),
        )

    def to_json(self) -> dict[str, Any]:
        """The content of `config.json`."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            "architectures": ["PhiForCausalLM"],
            "model_type": self.model_type,
            **fields,
            "attention_dropout": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "hidden_act": "gelu_new",
            "initializer_range": 0.02,
            "qk_layernorm": False,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "torch_dtype": "float16",
            "use_cache": True,
        }


def parse(f: Fields) -> PhiConfig:
    """The configuration of a `config.json`, checked."""
    f.expect("hidden_act", "gelu_new")
    f.expect("qk_layernorm", False)
    f.expect("tie_word_embeddings", False)
    kind = f.rope().get("rope_type", f.rope().get("type", "default"))
    Fields({"rope type": kind}, f.path).expect("rope type", "default")
    heads = f.positive("num_attention_heads")
    hidden = f.positive("hidden_size")
    config = PhiConfig(
        vocab_size=f.positive("vocab_size"),
        hidden_size=hidden,
        intermediate_size=f.positive("intermediate_size", 4 * hidden),
        num_hidden_layers=f.layers("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=f.positive("num_key_value_heads", heads),
        max_position_embeddings=f.context("max_position_embeddings"),
        layer_norm_eps=f.real("layer_norm_eps", 1e-5),
        rope_theta=f.rope_theta(),
        partial_rotary_factor=f.partial_rotary_factor(0.5),
        bos_token_id=f.token("bos_token_id"),
        eos_token_id=f.token("eos_token_id"),
        pad_token_id=f.token("pad_token_id"),
    )
    f.heads(hidden, heads, config.num_key_value_heads)
    dims = int(config.head_dim * config.partial_rotary_factor)
    if dims < 2 or dims % 2:
        raise CheckpointError(f"{f.path}: partial_rotary_factor leaves {dims} dimensions of a head to rotate")
    return config
