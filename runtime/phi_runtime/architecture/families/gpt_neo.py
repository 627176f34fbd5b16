"""`model_type: gpt_neo`: the TinyStories models (arXiv:2305.07759).

Its attention does not divide the scores by the square root of the head's width.
"""

from dataclasses import dataclass
from typing import Any

from phi_runtime.architecture.decoder import Decoder, Layer, Linear, Norm
from phi_runtime.architecture.families.fields import Fields
from phi_runtime.errors import CheckpointError

_PROJECTIONS = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True)
class GptNeoConfig:
    """A GPT-Neo decoder: learnt positions, global and local attention by turns, head tied to the embedding."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    max_position_embeddings: int
    layer_norm_epsilon: float
    window_size: int
    attention_layers: tuple[str, ...]
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    model_type = "gpt_neo"

    @property
    def sliding_window(self) -> int | None:
        """The window of the local layers."""
        return self.window_size if "local" in self.attention_layers else None

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint, in the order of computation."""
        h, i = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {
            "transformer.wte.weight": (self.vocab_size, h),
            "transformer.wpe.weight": (self.max_position_embeddings, h),
        }

        def add(name: str, *weight: int) -> None:
            shapes[name + ".weight"], shapes[name + ".bias"] = weight, weight[:1]

        for n in range(self.num_layers):
            p = f"transformer.h.{n}."
            add(p + "ln_1", h)
            for name in _PROJECTIONS:
                shapes[p + f"attn.attention.{name}.weight"] = (h, h)
            add(p + "attn.attention.out_proj", h, h)
            add(p + "ln_2", h)
            add(p + "mlp.c_fc", i, h)
            add(p + "mlp.c_proj", h, i)
        add("transformer.ln_f", h)
        return shapes

    def decoder(self) -> Decoder:
        """The model in the terms of all families."""

        def linear(name: str) -> Linear:
            return Linear((name + ".weight",), (name + ".bias",))

        def norm(name: str) -> Norm:
            return Norm(name + ".weight", name + ".bias")

        local = self.window_size if self.window_size < self.max_position_embeddings else None
        return Decoder(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            heads=self.num_heads,
            kv_heads=self.num_heads,
            head_dim=self.hidden_size // self.num_heads,
            context=self.max_position_embeddings,
            norm_eps=self.layer_norm_epsilon,
            activation="gelu_new",
            attention_scale=1.0,
            rope=None,
            embedding="transformer.wte.weight",
            positions="transformer.wpe.weight",
            layers=tuple(
                Layer(
                    attention_norm=norm(p + "ln_1"),
                    mlp_norm=norm(p + "ln_2"),
                    qkv=Linear(tuple(p + f"attn.attention.{name}.weight" for name in _PROJECTIONS)),
                    o=linear(p + "attn.attention.out_proj"),
                    up=linear(p + "mlp.c_fc"),
                    down=linear(p + "mlp.c_proj"),
                    window=local if kind == "local" else None,
                )
                for p, kind in ((f"transformer.h.{n}.", kind) for n, kind in enumerate(self.attention_layers))
            ),
            final_norm=norm("transformer.ln_f"),
            head=Linear(("transformer.wte.weight",)),
        )

    def to_json(self) -> dict[str, Any]:
        """The content of `config.json`."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            "architectures": ["GPTNeoForCausalLM"],
            "model_type": self.model_type,
            **fields,
            "attention_layers": list(self.attention_layers),
            "attention_types": [[[kind], 1] for kind in self.attention_layers],
            "activation_function": "gelu_new",
            "attention_dropout": 0.0,
            "embed_dropout": 0.0,
            "resid_dropout": 0.0,
            "initializer_range": 0.02,
            "tie_word_embeddings": True,
            "torch_dtype": "float32",
            "use_cache": True,
        }


def parse(f: Fields) -> GptNeoConfig:
    """The configuration of a `config.json`, checked."""
    f.expect("activation_function", "gelu_new")
    f.expect("tie_word_embeddings", True)
    hidden = f.positive("hidden_size")
    layers = f.layers("num_layers")
    config = GptNeoConfig(
        vocab_size=f.positive("vocab_size"),
        hidden_size=hidden,
        intermediate_size=f.positive("intermediate_size", 4 * hidden),
        num_layers=layers,
        num_heads=f.positive("num_heads"),
        max_position_embeddings=f.context("max_position_embeddings"),
        layer_norm_epsilon=f.real("layer_norm_epsilon", 1e-5),
        window_size=f.positive("window_size", 256),
        attention_layers=_attention_layers(f, layers),
        bos_token_id=f.token("bos_token_id"),
        eos_token_id=f.token("eos_token_id"),
        pad_token_id=f.token("pad_token_id"),
    )
    f.heads(hidden, config.num_heads, config.num_heads)
    return config


def _attention_layers(f: Fields, count: int) -> tuple[str, ...]:
    """`global` or `local` per layer: written out, or as [[kinds], repetitions] in `attention_types`."""
    kinds = f.raw.get("attention_layers")
    if kinds is None:
        kinds = []
        said = f.get("attention_types", [[["global", "local"], -(-count // 2)]])
        for entry in said if isinstance(said, list) else [said]:
            try:
                names, times = entry
                kinds += list(names) * min(int(times), count)
            except (TypeError, ValueError, OverflowError):
                raise CheckpointError(f"{f.path}: attention_types holds {entry!r}") from None
        kinds = kinds[:count]
    if not isinstance(kinds, list) or len(kinds) != count or any(k not in ("global", "local") for k in kinds):
        raise CheckpointError(f"{f.path}: attention_layers should name global or local for each of {count} layers")
    return tuple(kinds)
