"""Recipes: each a function that gives one complete, frozen configuration.

`phi-train RECIPE --set name=value` changes fields; `model.name` changes the architecture's.
"""

import dataclasses
import difflib
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from phi_runtime.config import Phi3Config, parse_config
from phi_runtime.errors import PhiError, UsageError


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run. Counts are in sequences and optimizer steps."""

    name: str
    model: Phi3Config
    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    weight_decay: float
    beta1: float = 0.9
    beta2: float = 0.95
    gradient_clipping: float = 1.0
    precision: str = "bf16"  # matrix products; weights and optimizer stay in float32
    seed: int = 0
    save_every: int = 100
    eval_windows: int = 32
    corpus: str = "stdlib"
    tokenizer: str | None = None  # folder; None trains one on the corpus
    data: str | None = None  # folder of shards; None tokenises the corpus


def phi3_demo() -> Recipe:
    """A Phi-3 of a few million parameters on Python's standard library, in minutes on two cores.

    head_dim 96, fused projections and window as phi-3-mini's; sizes and schedule are ours.
    """
    return Recipe(
        name="phi3-demo",
        model=Phi3Config(
            vocab_size=4096,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=512,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            sliding_window=2047,
            bos_token_id=None,  # these three come from the tokenizer
            eos_token_id=None,
            pad_token_id=None,
        ),
        steps=700,
        batch_size=4,
        sequence_length=512,
        learning_rate=2e-3,
        final_learning_rate=1e-4,
        warmup_steps=40,
        weight_decay=0.1,
    )


def phi3_proxy_small() -> Recipe:
    """A stand-in for phi-3-mini where quantisation is measured: its head_dim, fused projections and proportions,
    rows that divide into super-blocks of 256, and a window that is reached. Half an hour to an hour of two cores.
    """
    demo = phi3_demo()
    model = dataclasses.replace(
        demo.model,
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        sliding_window=512,
    )
    return dataclasses.replace(demo, name="phi3-proxy-small", model=model, steps=1000, learning_rate=1e-3)


def phi3_proxy() -> Recipe:
    """`phi3_proxy_small`, twice as deep."""
    small = phi3_proxy_small()
    model = dataclasses.replace(small.model, num_hidden_layers=6)
    return dataclasses.replace(small, name="phi3-proxy", model=model)


RECIPES: dict[str, Callable[[], Recipe]] = {
    "phi3-demo": phi3_demo,
    "phi3-proxy-small": phi3_proxy_small,
    "phi3-proxy": phi3_proxy,
}


def get_recipe(name: str, settings: list[str]) -> Recipe:
    """A recipe by name with `key=value` settings applied. Raises UsageError, with the nearest name."""
    if name not in RECIPES:
        raise UsageError(f"no recipe {name!r}{_nearest(name, RECIPES)}; `phi-train list` names them all")
    recipe = RECIPES[name]()
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise UsageError(f"--set {setting!r} should be key=value")
        if key.startswith("model."):
            recipe = dataclasses.replace(recipe, model=_replace(recipe.model, key.removeprefix("model."), value))
        else:
            recipe = _replace(recipe, key, value)
    _check(recipe)
    return recipe


def _replace(target: Any, key: str, text: str) -> Any:
    fields = {f.name for f in dataclasses.fields(target)} - {"name", "model"}
    if key not in fields:
        raise UsageError(f"no setting {key!r}{_nearest(key, fields)}")
    hint = get_type_hints(type(target))[key]
    optional = get_origin(hint) in (Union, types.UnionType)
    if bool in (hint, *get_args(hint)):
        if text.lower() not in ("true", "false"):
            raise UsageError(f"--set {key}={text}: should be true or false")
        return dataclasses.replace(target, **{key: text.lower() == "true"})
    if optional and text.lower() == "none":
        return dataclasses.replace(target, **{key: None})
    kind = next(t for t in get_args(hint) if t is not type(None)) if optional else hint
    try:
        value = kind(text)
    except (TypeError, ValueError):
        raise UsageError(f"--set {key}={text}: should be a {kind.__name__}") from None
    return dataclasses.replace(target, **{key: value})


def _nearest(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 1, 0.4)
    return f" (did you mean {close[0]}?)" if close else ""


def _check(r: Recipe) -> None:
    try:
        parse_config(r.model.to_json(), Path("--set model"))
    except PhiError as e:
        raise UsageError(str(e)) from None
    m = r.model
    if m.rope_scaling is not None or m.partial_rotary_factor != 1 or m.tie_word_embeddings:
        raise UsageError(
            "training carries full rotary embeddings, without rope_scaling, and an untied head; "
            "leave model.partial_rotary_factor and model.tie_word_embeddings as they are"
        )
    bounds = {"beta1": 1, "beta2": 1, "weight_decay": 100, "final_learning_rate": 100, "warmup_steps": 2**31}
    for name, most in (bounds | {"seed": 2**63, "gradient_clipping": 1e9}).items():
        if not 0 <= getattr(r, name) < most:
            raise UsageError(f"--set {name}={getattr(r, name)}: should be from 0 to below {most:g}")
    positive = ("steps", "batch_size", "sequence_length", "learning_rate", "save_every", "eval_windows")
    for name in positive:
        if not getattr(r, name) > 0:
            raise UsageError(f"--set {name}={getattr(r, name)}: should be above 0")
    if r.sequence_length < 2 or r.sequence_length > r.model.max_position_embeddings:
        raise UsageError(
            f"sequence_length {r.sequence_length} is not between 2 and the context of {r.model.max_position_embeddings}"
        )
    if r.precision not in ("bf16", "fp32"):
        raise UsageError(f"precision {r.precision!r} is none of bf16, fp32")
