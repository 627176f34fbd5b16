"""Recipes: each a function that gives the configuration of one system of the family.

Numbers are the papers' own where they give them; the fields of `assumed` are our choice, because they are not public.
Each system has a `-demo` beside it: the same architecture and schedule, small enough for minutes on a laptop.

Papers: TinyStories arXiv:2305.07759, phi-1 arXiv:2306.11644, phi-1.5 arXiv:2309.05463, phi-2 (Microsoft Research's
blog, December 2023), phi-3 arXiv:2404.14219.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from phi_runtime.architecture.config import AnyConfig, GptNeoConfig, LongRope, Phi3Config, Phi3SmallConfig, PhiConfig
from phi_runtime.contract import nearest
from phi_runtime.errors import UsageError
from phi_train.recipes.config import (
    SETTINGS,
    Data,
    Objective,
    Optimizer,
    Parallelism,
    Recipe,
    Schedule,
    apply_settings,
    from_dict,
    merge,
    read_recipe_file,
    vary,
)
from phi_train.recipes.published import (
    phi1_small_config,
    phi3_medium_4k,
    phi3_mini_4k,
    phi3_mini_128k,
    phi3_small_8k,
    phi_1_5,
    phi_2,
    tinystories,
)

_CORPUS = (
    "data.corpus",
    "data.tokenizer",
    "data.shards",
    "seed",
    "save_every",
    "data.eval_windows",
    "optimizer.max_grad_norm",
)


def _demo_model() -> Phi3Config:
    return Phi3Config(
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
    )


def phi3_demo() -> Recipe:
    """A Phi-3 of a few million parameters on Python's standard library, in minutes on two cores.

    head_dim 96, fused projections and window as phi-3-mini's; sizes and schedule are ours.
    """
    return Recipe(
        name="phi3-demo",
        model=_demo_model(),
        data=Data(batch_size=4, sequence_length=512),
        optimizer=Optimizer(lr=2e-3, weight_decay=0.1),
        schedule=Schedule(steps=700, final_lr=1e-4, warmup_steps=40),
        initializer="fan_in",  # measured in docs/how-to/train.md
    )


def phi3_proxy_small() -> Recipe:
    """A stand-in for phi-3-mini where quantisation is measured: its head_dim, fused projections and proportions,
    rows that divide into super-blocks of 256, and a window that is reached. Half an hour to an hour of two cores.
    """
    model = dataclasses.replace(
        _demo_model(),
        hidden_size=768,
        intermediate_size=2048,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        sliding_window=512,
    )
    return vary(
        phi3_demo(),
        name="phi3-proxy-small",
        model=model,
        optimizer={"lr": 1e-3},
        schedule={"steps": 1000},
        initializer="published",
    )


def phi3_proxy() -> Recipe:
    """`phi3_proxy_small`, twice as deep."""
    small = apply_settings(phi3_proxy_small(), ["model.num_hidden_layers=6"])
    return vary(small, name="phi3-proxy")


def tinystories_recipe(hidden_size: int, layers: int, name: str) -> Recipe:
    """TinyStories: a constant 5e-4 over batches of 80 x 16 sequences of 512 tokens."""
    return Recipe(
        name=name,
        model=tinystories(hidden_size, layers),
        data=Data(batch_size=1280, sequence_length=512),
        optimizer=Optimizer(lr=5e-4, weight_decay=0.1),
        schedule=Schedule(
            steps=2300,  # three epochs of half a billion tokens
            final_lr=5e-4,
            warmup_steps=0,
            type="constant",
        ),
        parallelism=Parallelism(micro_batch_size=80),
        assumed=("schedule.steps", "schedule.warmup_steps", "optimizer.eps", "parallelism.precision", *_CORPUS),
    )


def phi1_base() -> Recipe:
    """phi-1-base: 1.3 B on 7 B tokens of filtered code and textbooks; step 24,000 of 36,000 is the published one."""
    return Recipe(
        name="phi1-base",
        model=phi_1_5(),
        save_every=1000,
        data=Data(batch_size=1024, sequence_length=2048),
        optimizer=Optimizer(lr=1e-3, weight_decay=0.1),
        schedule=Schedule(steps=36_000, final_lr=0.0, warmup_steps=750, type="linear"),
        parallelism=Parallelism(precision="fp16", micro_batch_size=8, zero_stage=2),
        objective=Objective(dropout=0.1),
        assumed=(
            "optimizer.beta1",
            "optimizer.beta2",
            "optimizer.eps",
            "schedule.final_lr",
            "parallelism.micro_batch_size",
            "parallelism.zero_stage",
            *_CORPUS,
        ),
    )


def phi1_small() -> Recipe:
    """phi-1-small: 350 M, trained as phi-1-base."""
    return vary(phi1_base(), name="phi1-small", model=phi1_small_config())


def phi1() -> Recipe:
    """phi-1: phi-1-base fine-tuned on CodeExercises; best of every thousandth step. Give the base as `init_from`."""
    return vary(
        phi1_base(),
        name="phi1",
        data={"batch_size": 256},
        optimizer={"lr": 1e-4, "weight_decay": 0.01},
        schedule={"steps": 6000, "warmup_steps": 50},
    )


def phi15() -> Recipe:
    """phi-1.5: 150 B tokens at a constant rate, without warm-up."""
    return Recipe(
        name="phi15",
        model=phi_1_5(),
        save_every=1000,
        data=Data(
            batch_size=2048,  # its unit is not stated; in sequences the steps come to 150 B tokens
            sequence_length=2048,
        ),
        optimizer=Optimizer(lr=2e-4, weight_decay=0.1, beta2=0.98, eps=1e-7),
        schedule=Schedule(steps=35_763, final_lr=2e-4, warmup_steps=0, type="constant"),
        parallelism=Parallelism(precision="fp16", micro_batch_size=8, zero_stage=2),
        assumed=("schedule.steps", "objective.dropout", "parallelism.micro_batch_size", *_CORPUS),
    )


def phi15_web() -> Recipe:
    """phi-1.5-web: 300 B tokens of filtered web, code and synthetic text, otherwise as phi-1.5."""
    web = phi15()
    unsaid = (
        "optimizer.lr",
        "optimizer.weight_decay",
        "schedule.type",
        "optimizer.beta1",
        "optimizer.beta2",
        "optimizer.eps",
        "data.batch_size",
        "schedule.warmup_steps",
    )
    return vary(
        web,
        name="phi15-web",
        schedule={"steps": 71_526},
        assumed=(*web.assumed, *unsaid),
    )


def phi15_web_only() -> Recipe:
    """phi-1.5-web-only: filtered web alone, otherwise as phi-1.5-web."""
    return vary(phi15_web(), name="phi15-web-only")


_UNSAID = (
    "schedule.steps",
    "data.batch_size",
    "optimizer.lr",
    "schedule.final_lr",
    "schedule.warmup_steps",
    "optimizer.weight_decay",
    "schedule.type",
    "optimizer.beta1",
    "optimizer.beta2",
    "optimizer.eps",
    "parallelism.micro_batch_size",
    "parallelism.zero_stage",
    "parallelism.gradient_checkpointing",
    *_CORPUS,
)


def phi2() -> Recipe:
    """phi-2: 1.4 T tokens over 250 B; its optimizer settings are not public. `phi-train grow` makes its beginning."""
    return Recipe(
        name="phi2",
        model=phi_2(),
        save_every=1000,
        data=Data(
            batch_size=2304,  # divides among the 96 GPUs that it was trained on
            sequence_length=2048,
        ),
        optimizer=Optimizer(lr=2e-4, weight_decay=0.1),
        schedule=Schedule(steps=296_699, final_lr=2e-5, warmup_steps=1000),
        parallelism=Parallelism(precision="bf16", micro_batch_size=8, zero_stage=1),
        objective=Objective(dropout=0.1),
        assumed=(*_UNSAID, "parallelism.precision"),
    )


def phi3_mini() -> Recipe:
    """phi-3-mini-4k: 3.3 T tokens in bfloat16; its optimizer settings are not public."""
    return Recipe(
        name="phi3-mini-4k",
        model=phi3_mini_4k(),
        save_every=1000,
        data=Data(batch_size=2048, sequence_length=4096),
        optimizer=Optimizer(lr=3e-4, weight_decay=0.1),
        schedule=Schedule(steps=393_391, final_lr=3e-5, warmup_steps=2000),
        parallelism=Parallelism(micro_batch_size=2, zero_stage=1),
        assumed=_UNSAID,
    )


def phi3_mini_long() -> Recipe:
    """phi-3-mini-128k: phi-3-mini stretched by LongRoPE and trained on at full length; give it as `init_from`."""
    return vary(
        phi3_mini(),
        name="phi3-mini-128k",
        model=phi3_mini_128k(),
        data={"batch_size": 64, "sequence_length": 131_072, "short_context_interval": 10},
        optimizer={"lr": 2e-5},
        schedule={
            "steps": 1192,  # 10 B tokens, as LongRoPE2 took for this model (arXiv:2502.20082)
            "final_lr": 0.0,
            "warmup_steps": 100,
        },
        parallelism={"micro_batch_size": 1, "zero_stage": 3, "gradient_checkpointing": True},
        assumed=(*_UNSAID, "data.sequence_length", "data.short_context_interval"),
    )


def phi3_small() -> Recipe:
    """phi-3-small-8k: 4.8 T tokens, a tenth of them multilingual, tuned on a smaller model by muP."""
    return vary(
        phi3_mini(),
        name="phi3-small-8k",
        model=phi3_small_8k(),
        data={"batch_size": 1024, "sequence_length": 8192},
        schedule={"steps": 572_205},
        parallelism={"zero_stage": 2},
        objective={"dropout": 0.1},
        assumed=(*_UNSAID,),
    )


def phi3_medium() -> Recipe:
    """phi-3-medium-4k: 4.8 T tokens."""
    return vary(
        phi3_mini(),
        name="phi3-medium-4k",
        model=phi3_medium_4k(),
        schedule={"steps": 572_205},
        parallelism={"zero_stage": 2, "micro_batch_size": 1},
    )


def phi3_sft() -> Recipe:
    """phi-3-mini fine-tuned on conversations, as the example beside its checkpoint; give init_from and data.

    Rate, schedule and warm-up of a fifth are that example's (sample_finetune.py); phi-3's own are not public.
    """
    return vary(
        phi3_mini(),
        name="phi3-mini-4k-sft",
        save_every=200,
        data={"batch_size": 64, "sequence_length": 2048},
        optimizer={"lr": 5e-6},
        schedule={"steps": 1000, "final_lr": 0.0, "warmup_steps": 200},
        parallelism={"gradient_checkpointing": True},
        objective={"type": "sft"},
        assumed=tuple(n for n in _UNSAID if n not in ("optimizer.lr", "schedule.final_lr", "schedule.warmup_steps")),
    )


def phi3_lora() -> Recipe:
    """phi-3-mini with an adapter of rank 16 beside every matrix of its layers; give init_from and data.

    Rank, alpha and rate are ours, of the order of QLoRA's (arXiv:2305.14314).
    """
    return vary(
        phi3_sft(),
        name="phi3-mini-4k-lora",
        data={"batch_size": 16},
        optimizer={"lr": 2e-4},
        schedule={"steps": 500, "warmup_steps": 25},
        objective={"lora_rank": 16, "lora_alpha": 32.0},
        assumed=(*_UNSAID, "objective.lora_rank", "objective.lora_alpha", "data.sequence_length"),
    )


def phi3_qlora() -> Recipe:
    """The same beside a base in four bits, on the exporter's grid (arXiv:2305.14314)."""
    return vary(phi3_lora(), name="phi3-mini-4k-qlora", objective={"lora_base": "int4-g32"})


def phi3_dpo() -> Recipe:
    """phi-3-mini after its preferences, its own bad answers rejected; give init_from and data. Numbers are ours."""
    return vary(
        phi3_sft(),
        name="phi3-mini-4k-dpo",
        data={"batch_size": 32},
        optimizer={"lr": 5e-7},
        schedule={"steps": 500, "warmup_steps": 50},
        parallelism={"micro_batch_size": 1},
        objective={"type": "dpo"},
        assumed=(*_UNSAID, "objective.dpo_beta", "data.sequence_length"),
    )


def _small(m: AnyConfig) -> AnyConfig:
    """An architecture at a laptop's size."""
    sizes: dict[str, Any] = {"vocab_size": 4096, "max_position_embeddings": 256, "hidden_size": 256}
    if isinstance(m, GptNeoConfig):
        sizes |= {"intermediate_size": 1024, "num_layers": 4, "num_heads": 4, "window_size": 64}
        return dataclasses.replace(m, **sizes, attention_layers=("global", "local") * 2)
    sizes |= {"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 4}
    if isinstance(m, Phi3SmallConfig):
        sizes |= {"ff_intermediate_size": 512, "num_attention_heads": 8, "num_key_value_heads": 2}
        return dataclasses.replace(m, **sizes, blocksparse_block_size=16, blocksparse_num_local_blocks=4)
    if isinstance(m, PhiConfig):
        sizes["hidden_size"] = 320 if m.partial_rotary_factor == 0.4 else 256  # phi-2 has heads of 80
        return dataclasses.replace(m, **sizes, intermediate_size=1024)
    sizes |= {"intermediate_size": 512, "num_key_value_heads": 4 * m.num_key_value_heads // m.num_attention_heads}
    small = dataclasses.replace(m, **sizes)
    if m.rope_scaling is None:
        return small
    pairs, known = small.head_dim // 2, len(m.rope_scaling.long_factor)
    kept = [round(i * (known - 1) / (pairs - 1)) for i in range(pairs)]
    short, long = (tuple(f[i] for i in kept) for f in (m.rope_scaling.short_factor, m.rope_scaling.long_factor))
    context: dict[str, Any] = {"max_position_embeddings": 1024, "original_max_position_embeddings": 128}
    return dataclasses.replace(small, rope_scaling=LongRope(short, long), **context)


def _demo(whole: Callable[[], Recipe]) -> Recipe:
    """A system at a laptop's size: its architecture, schedule and optimizer, narrow, shallow and short."""
    r = whole()
    model = dataclasses.replace(_small(r.model), bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return vary(
        r,
        name=f"{r.name}-demo",
        model=model,
        save_every=100,
        data={"batch_size": 16, "sequence_length": model.max_position_embeddings},
        initializer="fan_in" if isinstance(model, Phi3Config | Phi3SmallConfig) else "published",  # as `phi3_demo`
        optimizer={"lr": 2e-3},
        schedule={
            "steps": 300,
            "final_lr": 2e-3 if r.schedule.type == "constant" else 0.0,
            "warmup_steps": min(r.schedule.warmup_steps, 30),
        },
        parallelism={"precision": "auto", "micro_batch_size": None, "zero_stage": 0, "gradient_checkpointing": False},
        assumed=tuple(sorted({*SETTINGS, "model"} - {"schedule.type", "optimizer.weight_decay"})),
    )


def _tuning_demo(whole: Callable[[], Recipe], steps: int, learning_rate: float) -> Recipe:
    """What follows pre-training, on the demo of phi-3-mini: rates that move so small a model."""
    return vary(
        _demo(whole),
        optimizer={"lr": learning_rate},
        schedule={"steps": steps, "warmup_steps": 10},
        objective={"type": whole().objective.type},
    )


_SYSTEMS: dict[str, Callable[[], Recipe]] = {
    **{
        f"tinystories-{name}": partial(tinystories_recipe, width, layers, f"tinystories-{name}")
        for name, (width, layers) in {
            "1m": (64, 8), "3m": (128, 8), "8m": (256, 8), "28m": (512, 8), "33m": (768, 4),
        }.items()
    },
    "phi1-small": phi1_small,
    "phi1-base": phi1_base,
    "phi1": phi1,
    "phi15": phi15,
    "phi15-web": phi15_web,
    "phi15-web-only": phi15_web_only,
    "phi2": phi2,
    "phi3-mini-4k": phi3_mini,
    "phi3-mini-128k": phi3_mini_long,
    "phi3-small-8k": phi3_small,
    "phi3-medium-4k": phi3_medium,
}  # fmt: skip
# TinyStories' grid of depths and widths (its section on what each is for): tinystories-grid-L2-d256 and so on.
_TUNINGS: dict[str, Callable[[], Recipe]] = {
    "phi3-mini-4k-sft": phi3_sft,
    "phi3-mini-4k-lora": phi3_lora,
    "phi3-mini-4k-qlora": phi3_qlora,
    "phi3-mini-4k-dpo": phi3_dpo,
    "phi3-mini-4k-sft-demo": partial(_tuning_demo, phi3_sft, 200, 1e-3),
    "phi3-mini-4k-dpo-demo": partial(_tuning_demo, phi3_dpo, 60, 1e-4),
}
_GRID: dict[str, Callable[[], Recipe]] = {
    f"tinystories-grid-L{layers}-d{width}": partial(
        tinystories_recipe, width, layers, f"tinystories-grid-L{layers}-d{width}"
    )
    for layers in (1, 2, 4, 8, 12)
    for width in (64, 128, 256, 512, 768, 1024)
}
RECIPES: dict[str, Callable[[], Recipe]] = {
    "phi3-demo": phi3_demo,
    "phi3-proxy-small": phi3_proxy_small,
    "phi3-proxy": phi3_proxy,
    **_SYSTEMS,
    **{f"{name}-demo": partial(_demo, whole) for name, whole in _SYSTEMS.items()},
    **_TUNINGS,
    **_GRID,
}


def get_recipe(name: str, settings: list[str]) -> Recipe:
    """A recipe by name, or from a file (`.toml`, `.json`), with `key=value` settings applied.

    Raises UsageError, with the nearest name.
    """
    if name.endswith((".toml", ".json")):
        base, changes = read_recipe_file(Path(name))
        recipe = from_dict(changes if base is None else merge(_named(base), changes), name)
    else:
        recipe = _named(name)
    return apply_settings(recipe, settings)


def _named(name: str) -> Recipe:
    if name not in RECIPES:
        raise UsageError(f"no recipe {name!r}{nearest(name, RECIPES)}; `phi-train list` names them all")
    return RECIPES[name]()
