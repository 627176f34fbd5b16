"""`model_type: phi3`: phi-3-mini and -medium, phi-3.5-mini, phi-4-mini (arXiv:2404.14219)."""

import math
from dataclasses import dataclass, replace
from typing import Any

from phi_runtime.architecture.decoder import Decoder, Layer, Linear, Norm, Rope
from phi_runtime.architecture.families.fields import Fields, positive_real
from phi_runtime.errors import CheckpointError, UnsupportedError

_LONGROPE = ("longrope", "su", "yarn")  # as Hugging Face reads phi3's early configurations


@dataclass(frozen=True)
class LongRope:
    """`rope_scaling` of the long-context models: a factor per rotated pair (arXiv:2402.13753)."""

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    attention_factor: float | None = None


@dataclass(frozen=True)
class Phi3Config:
    """A dense Phi-3 decoder; fields as in its `config.json`."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    sliding_window: int | None
    bos_token_id: int | None
    eos_token_id: int | None
    pad_token_id: int | None
    original_max_position_embeddings: int | None = None  # by default all of them
    partial_rotary_factor: float = 1.0
    tie_word_embeddings: bool = False
    rope_scaling: LongRope | None = None

    model_type = "phi3"

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def qkv_size(self) -> int:
        """Rows of the fused `qkv_proj`: queries, then keys, then values."""
        return self.hidden_size + 2 * self.num_key_value_heads * self.head_dim

    def window(self) -> int | None:
        """The sliding window where it can matter, i.e. where it is shorter than the context."""
        w = self.sliding_window
        return w if w is not None and w < self.max_position_embeddings else None

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the checkpoint, in the order of computation."""
        h, i = self.hidden_size, self.intermediate_size
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab_size, h)}
        for n in range(self.num_hidden_layers):
            p = f"model.layers.{n}."
            shapes[p + "input_layernorm.weight"] = (h,)
            shapes[p + "self_attn.qkv_proj.weight"] = (self.qkv_size, h)
            shapes[p + "self_attn.o_proj.weight"] = (h, h)
            shapes[p + "post_attention_layernorm.weight"] = (h,)
            shapes[p + "mlp.gate_up_proj.weight"] = (2 * i, h)
            shapes[p + "mlp.down_proj.weight"] = (h, i)
        shapes["model.norm.weight"] = (h,)
        if not self.tie_word_embeddings:
            shapes["lm_head.weight"] = (self.vocab_size, h)
        return shapes

    def decoder(self) -> Decoder:
        """The model in the terms of all families."""
        return Decoder(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            heads=self.num_attention_heads,
            kv_heads=self.num_key_value_heads,
            head_dim=self.head_dim,
            context=self.max_position_embeddings,
            norm_eps=self.rms_norm_eps,
            activation="silu",
            attention_scale=self.head_dim**-0.5,
            rope=self._rope(),
            embedding="model.embed_tokens.weight",
            positions=None,
            layers=tuple(
                Layer(
                    attention_norm=Norm(p + "input_layernorm.weight"),
                    mlp_norm=Norm(p + "post_attention_layernorm.weight"),
                    qkv=Linear((p + "self_attn.qkv_proj.weight",)),
                    o=Linear((p + "self_attn.o_proj.weight",)),
                    up=Linear((p + "mlp.gate_up_proj.weight",)),
                    down=Linear((p + "mlp.down_proj.weight",)),
                    window=self.window(),
                )
                for p in (f"model.layers.{n}." for n in range(self.num_hidden_layers))
            ),
            final_norm=Norm("model.norm.weight"),
            head=Linear(("model.embed_tokens.weight" if self.tie_word_embeddings else "lm_head.weight",)),
        )

    def _rope(self) -> Rope:
        dims = int(self.head_dim * self.partial_rotary_factor)
        if self.rope_scaling is None:
            return Rope(self.rope_theta, dims)
        original = self.original_max_position_embeddings or self.max_position_embeddings
        scaling = self.rope_scaling
        factor = scaling.attention_factor
        if factor is None:
            stretch = self.max_position_embeddings / original
            factor = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        return Rope(self.rope_theta, dims, scaling.short_factor, scaling.long_factor, original, factor)

    def to_json(self) -> dict[str, Any]:
        """The content of `config.json`, as published ones spell it."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        scaling: dict[str, Any] | None = None
        if self.rope_scaling is not None:
            scaling = {
                "type": "longrope",
                "short_factor": list(self.rope_scaling.short_factor),
                "long_factor": list(self.rope_scaling.long_factor),
            }
            if self.rope_scaling.attention_factor is not None:
                scaling["attention_factor"] = self.rope_scaling.attention_factor
        return {
            "architectures": ["Phi3ForCausalLM"],
            "model_type": self.model_type,
            **fields,
            "attention_bias": False,
            "attention_dropout": 0.0,
            "embd_pdrop": 0.0,
            "resid_pdrop": 0.0,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "original_max_position_embeddings": self.original_max_position_embeddings or self.max_position_embeddings,
            "rope_scaling": scaling,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }


def parse(f: Fields) -> Phi3Config:
    """The configuration of a `config.json`, checked."""
    f.expect("hidden_act", "silu")
    f.expect("attention_bias", False)
    heads = f.positive("num_attention_heads")
    context = f.context("max_position_embeddings")
    original = f.rope().get("original_max_position_embeddings") or f.get("original_max_position_embeddings", context)
    if type(original) is not int or not 2 <= original <= context:
        raise CheckpointError(f"{f.path}: original_max_position_embeddings {original!r} is not from 2 to {context}")
    config = Phi3Config(
        vocab_size=f.positive("vocab_size"),
        hidden_size=f.positive("hidden_size"),
        intermediate_size=f.positive("intermediate_size"),
        num_hidden_layers=f.layers("num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=f.positive("num_key_value_heads", heads),
        max_position_embeddings=context,
        rms_norm_eps=f.real("rms_norm_eps", 1e-5),
        rope_theta=f.rope_theta(),
        sliding_window=f.positive("sliding_window") if f.get("sliding_window") is not None else None,
        bos_token_id=f.token("bos_token_id"),
        eos_token_id=f.token("eos_token_id"),
        pad_token_id=f.token("pad_token_id"),
        original_max_position_embeddings=None if original == context else original,
        partial_rotary_factor=f.partial_rotary_factor(1.0),
        tie_word_embeddings=f.flag("tie_word_embeddings", False),
    )
    if (config.window() or 2) < 2:
        raise CheckpointError(f"{f.path}: its sliding window is of one token")
    f.heads(config.hidden_size, heads, config.num_key_value_heads)
    dims = int(config.head_dim * config.partial_rotary_factor)
    if dims < 2 or dims % 2:
        raise CheckpointError(f"{f.path}: partial_rotary_factor leaves {dims} dimensions of a head to rotate")
    return _with_rope(f, config, dims)


def _with_rope(f: Fields, config: Phi3Config, dims: int) -> Phi3Config:
    """The configuration with its `rope_scaling`, if it has one, in any of its spellings."""
    rope = f.rope()
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return config
    if kind not in _LONGROPE or "short_factor" not in rope:
        raise UnsupportedError(f"{f.path}: rope type {kind!r} is not one we know (we know: default, longrope, su)")
    factors = []
    for name in ("short_factor", "long_factor"):
        values = rope.get(name)
        if not isinstance(values, list) or len(values) != dims // 2:
            raise CheckpointError(f"{f.path}: {name} of rope_scaling should list {dims // 2} numbers")
        factors.append(tuple(positive_real(v, name, f.path) for v in values))
    attention = rope.get("attention_factor")
    if attention is not None:
        attention = positive_real(attention, "attention_factor", f.path)
    return replace(config, rope_scaling=LongRope(factors[0], factors[1], attention))
