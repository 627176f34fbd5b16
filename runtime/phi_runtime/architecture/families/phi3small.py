"""`model_type: phi3small`: phi-3-small-8k (arXiv:2404.14219), as its published configuration and code define it.

transformers has no class for it, and its own code is never run (`trust_remote_code`). Per key-value
head, `query_key_value` holds that group's queries, then its key, then its value; the rows of the MLP's gate and
linear part alternate. Tokens of `dummy_token_indices` are not suppressed: what samples may leave them out.
"""

from dataclasses import dataclass
from typing import Any

from phi_runtime.architecture.decoder import BlockSparse, Decoder, Layer, Linear, Norm, Rope
from phi_runtime.architecture.families.fields import Fields


@dataclass(frozen=True)
class Phi3SmallConfig:
    """A phi-3-small decoder: gegelu, muP's scales, block-sparse attention but in every n-th layer."""

    vocab_size: int
    hidden_size: int
    ff_intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    layer_norm_epsilon: float
    rope_embedding_base: float
    gegelu_limit: float
    mup_use_scaling: bool
    mup_attn_multiplier: float
    mup_embedding_multiplier: float
    mup_width_multiplier: float
    blocksparse_block_size: int
    blocksparse_num_local_blocks: int
    blocksparse_vert_stride: int
    dense_attention_every_n_layers: int
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None

    model_type = "phi3small"
    sliding_window = None

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint, in the order of computation."""
        h, i = self.hidden_size, self.ff_intermediate_size
        qkv = h + 2 * self.num_key_value_heads * (h // self.num_attention_heads)
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, h)}

        def add(name: str, *weight: int) -> None:
            shapes[name + ".weight"], shapes[name + ".bias"] = weight, weight[:1]

        for n in range(self.num_hidden_layers):
            p = f"model.layers.{n}."
            add(p + "input_layernorm", h)
            add(p + "self_attn.query_key_value", qkv, h)
            add(p + "self_attn.dense", h, h)
            add(p + "post_attention_layernorm", h)
            add(p + "mlp.up_proj", 2 * i, h)
            add(p + "mlp.down_proj", h, i)
        add("model.final_layernorm", h)
        return shapes

    def decoder(self) -> Decoder:
        """The model in the terms of all families."""

        def linear(name: str) -> Linear:
            return Linear((name + ".weight",), (name + ".bias",))

        def norm(name: str) -> Norm:
            return Norm(name + ".weight", name + ".bias")

        head_dim = self.hidden_size // self.num_attention_heads
        scale = self.mup_attn_multiplier / head_dim if self.mup_use_scaling else head_dim**-0.5
        sparse = BlockSparse(
            self.blocksparse_block_size, self.blocksparse_num_local_blocks, self.blocksparse_vert_stride
        )
        return Decoder(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.ff_intermediate_size,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            head_dim=head_dim,
            context=self.max_position_embeddings,
            norm_eps=self.layer_norm_epsilon,
            activation="gegelu",
            attention_scale=scale,
            rope=Rope(self.rope_embedding_base, head_dim),
            embedding="model.embed_tokens.weight",
            positions=None,
            layers=tuple(
                Layer(
                    attention_norm=norm(p + "input_layernorm"),
                    mlp_norm=norm(p + "post_attention_layernorm"),
                    qkv=linear(p + "self_attn.query_key_value"),
                    o=linear(p + "self_attn.dense"),
                    up=linear(p + "mlp.up_proj"),
                    down=linear(p + "mlp.down_proj"),
                    sparse=None if (n + 1) % self.dense_attention_every_n_layers == 0 else sparse,
                )
                for n, p in ((n, f"model.layers.{n}.") for n in range(self.num_hidden_layers))
            ),
            final_norm=norm("model.final_layernorm"),
            head=Linear(("model.embed_tokens.weight",)),
            qkv_by_group=True,
            gegelu_limit=self.gegelu_limit,
            embedding_scale=self.mup_embedding_multiplier,
            logit_scale=1 / self.mup_width_multiplier,
        )

    def to_json(self) -> dict[str, Any]:
        """The content of `config.json`."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {
            "architectures": ["Phi3SmallForCausalLM"],
            "model_type": self.model_type,
            **fields,
            "blocksparse_homo_head_pattern": False,
            "hidden_act": "gegelu",
            "rope_position_scale": 1.0,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
        }


def parse(f: Fields) -> Phi3SmallConfig:
    """The configuration of a `config.json`, checked."""
    f.expect("hidden_act", "gegelu")
    f.expect("blocksparse_homo_head_pattern", False)
    f.expect("rope_position_scale", 1.0)
    f.expect("tie_word_embeddings", True)
    kind = f.rope().get("rope_type", f.rope().get("type", "default"))
    Fields({"rope type": kind}, f.path).expect("rope type", "default")
    heads, hidden = f.positive("num_attention_heads"), f.positive("hidden_size")
    config = Phi3SmallConfig(
        vocab_size=f.positive("vocab_size"),
        hidden_size=hidden,
        ff_intermediate_size=f.positive("ff_intermediate_size"),
        num_hidden_layers=f.layers("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=f.positive("num_key_value_heads", heads),
        max_position_embeddings=f.context("max_position_embeddings"),
        layer_norm_epsilon=f.real("layer_norm_epsilon", 1e-5),
        rope_embedding_base=f.real("rope_embedding_base", 1e6),
        gegelu_limit=f.real("gegelu_limit", 20.0),
        mup_use_scaling=f.flag("mup_use_scaling", True),
        mup_attn_multiplier=f.real("mup_attn_multiplier", 1.0),
        mup_embedding_multiplier=f.real("mup_embedding_multiplier", 10.0),
        mup_width_multiplier=f.real("mup_width_multiplier", 8.0),
        blocksparse_block_size=f.positive("blocksparse_block_size", 64),
        blocksparse_num_local_blocks=f.positive("blocksparse_num_local_blocks", 16),
        blocksparse_vert_stride=f.positive("blocksparse_vert_stride", 8),
        dense_attention_every_n_layers=f.positive("dense_attention_every_n_layers", 2),
        bos_token_id=f.token("bos_token_id"),
        eos_token_id=f.token("eos_token_id"),
        pad_token_id=f.token("pad_token_id"),
    )
    f.heads(hidden, heads, config.num_key_value_heads)
    return config
