"""What an architecture is: the fields of `config.json`, checked, and the tensors they imply.

Fields keep Hugging Face's spelling. This is the one home of "which Phi do we know".
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi_runtime.errors import CheckpointError, UnsupportedError

KNOWN_MODEL_TYPES = ("phi3",)
_MAX_CONTEXT = 1 << 20
_MAX_LAYERS = 1000  # the largest has 40; bounds the work on a config that lies


@dataclass(frozen=True)
class Phi3Config:
    """A dense Phi-3 decoder (`model_type: phi3`), as published for phi-3-mini-4k and -medium-4k.

    Attention rule, the project's one definition of the window: key j is visible to query i
    iff 0 <= i - j < sliding_window (and 0 <= i - j where there is no window).
    """

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

    model_type = "phi3"

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_size(self) -> int:
        """Width of all keys (or all values) of one token in one layer."""
        return self.num_key_value_heads * self.head_dim

    @property
    def qkv_size(self) -> int:
        """Rows of the fused `qkv_proj`: queries, then keys, then values."""
        return self.hidden_size + 2 * self.kv_size

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
        shapes["lm_head.weight"] = (self.vocab_size, h)
        return shapes

    def num_parameters(self) -> int:
        """Weights of the model, embedding and head counted apart (phi-3-mini: 3,821,079,552)."""
        total = 0
        for shape in self.tensor_shapes().values():
            n = 1
            for d in shape:
                n *= d
            total += n
        return total

    def to_json(self) -> dict[str, Any]:
        """The content of `config.json`."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
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
            "original_max_position_embeddings": self.max_position_embeddings,
            "rope_scaling": None,
            "tie_word_embeddings": False,
            "torch_dtype": "bfloat16",
            "use_cache": True,
        }


def read_config(folder: Path) -> Phi3Config:
    """Read `config.json` of a checkpoint folder."""
    path = folder / "config.json"
    return parse_config(read_json(path), path)


def parse_config(raw: dict[str, Any], path: Path) -> Phi3Config:
    """Check the content of a `config.json`; `path` is for the messages only.

    Raises UnsupportedError for a model we do not know, CheckpointError for nonsense.
    """
    model_type = raw.get("model_type")
    if model_type not in KNOWN_MODEL_TYPES:
        raise UnsupportedError(
            f"{path}: model_type {model_type!r} is not one we know (we know: {', '.join(KNOWN_MODEL_TYPES)})"
        )
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise CheckpointError(f"{path}: rope_scaling should be an object, it is {rope!r}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    _expect(path, "rope type", kind, "default")
    _expect(path, "hidden_act", raw.get("hidden_act", "silu"), "silu")
    _expect(path, "attention_bias", raw.get("attention_bias", False), False)
    _expect(path, "tie_word_embeddings", raw.get("tie_word_embeddings", False), False)
    partial = rope.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    _expect(path, "partial_rotary_factor", partial, 1.0)

    heads = _positive(raw, "num_attention_heads", path)
    config = Phi3Config(
        vocab_size=_positive(raw, "vocab_size", path),
        hidden_size=_positive(raw, "hidden_size", path),
        intermediate_size=_positive(raw, "intermediate_size", path),
        num_hidden_layers=_positive(raw, "num_hidden_layers", path),
        num_attention_heads=heads,
        num_key_value_heads=_positive({"num_key_value_heads": heads} | _set(raw), "num_key_value_heads", path),
        max_position_embeddings=_positive(raw, "max_position_embeddings", path),
        rms_norm_eps=_real(raw.get("rms_norm_eps", 1e-5), "rms_norm_eps", path),
        rope_theta=_real(rope.get("rope_theta", raw.get("rope_theta", 10000.0)), "rope_theta", path),
        sliding_window=_positive(raw, "sliding_window", path) if raw.get("sliding_window") is not None else None,
        bos_token_id=_token(raw, "bos_token_id", path),
        eos_token_id=_token(raw, "eos_token_id", path),
        pad_token_id=_token(raw, "pad_token_id", path),
    )
    if config.num_hidden_layers > _MAX_LAYERS:
        raise CheckpointError(f"{path}: num_hidden_layers {config.num_hidden_layers} is more than any Phi's")
    if not (config.window() or 2) >= 2 or not 2 <= config.max_position_embeddings <= _MAX_CONTEXT:
        raise CheckpointError(f"{path}: its context or window is of one token, or above {_MAX_CONTEXT} tokens")
    if config.hidden_size % heads or config.head_dim % 2 or heads % config.num_key_value_heads:
        raise CheckpointError(
            f"{path}: {heads} heads and {config.num_key_value_heads} key-value heads do not divide "
            f"hidden_size {config.hidden_size} into even widths"
        )
    return config


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, with an error that names the file.

    Raises CheckpointError if the file is missing, not UTF-8 JSON, or not an object.
    """
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: is not a regular file")
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(
            f"{path.parent}: no {path.name} there, so it is not a Hugging Face checkpoint; "
            "give the folder that holds config.json and *.safetensors"
        ) from None
    except (ValueError, RecursionError, IsADirectoryError) as e:
        raise CheckpointError(f"{path}: is not valid JSON ({e})") from None
    if not isinstance(raw, dict):
        raise CheckpointError(f"{path}: holds {type(raw).__name__}, not a JSON object")
    return raw


def _set(raw: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in raw.items() if v is not None}


def _expect(path: Path, name: str, value: object, known: object) -> None:
    if value != known:
        raise UnsupportedError(f"{path}: {name} is {value!r}; this version carries {known!r} only")


def _positive(raw: dict[str, Any], name: str, path: Path) -> int:
    value = raw.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 < value < 2**31:
        raise CheckpointError(f"{path}: {name} should be a positive whole number, it is {value!r}")
    return value


def _real(value: object, name: str, path: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e30:
        raise CheckpointError(f"{path}: {name} should be a positive number, it is {value!r}")
    return float(value)


def _token(raw: dict[str, Any], name: str, path: Path) -> int | None:
    value = raw.get(name)
    if isinstance(value, list):  # generation configs list several; the first is the model's own
        value = value[0] if value else None
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < raw["vocab_size"]:
        raise CheckpointError(f"{path}: {name} should be a token id below vocab_size, it is {value!r}")
    return value
