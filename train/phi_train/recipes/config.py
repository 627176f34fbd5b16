"""A recipe: one complete, frozen configuration of a training run, and how the command line changes it.

`phi-train RECIPE --set name=value` changes fields; `model.name` changes the architecture's, `model=CKPT` takes that of
a checkpoint.
"""

import dataclasses
import difflib
import math
import types
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Union, get_args, get_origin, get_type_hints

from phi_runtime.architecture.config import AnyConfig, parse_config, read_config
from phi_runtime.errors import PhiError, UsageError
from phi_train.grid import parse_grid

SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("bf16", "fp16", "fp32")
OBJECTIVES = ("pretrain", "sft", "dpo")  # the next token, the assistant's words, the preferred answer


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a training run. Counts are in sequences and optimizer steps.

    schedule: how the learning rate falls to `final_learning_rate` after a linear warm-up. dropout: of attention's
    weights and of what is added to the residual stream. micro_batch_size: sequences that a process takes at a time,
    None for all of its share. documents_apart: packed documents do not see each other. init_from: the checkpoint to
    begin with. objective: what a step makes small. teacher: a checkpoint whose distributions are learnt, by the share
    `distillation` of the loss. beta: of DPO. imitation: weight of the preferred answer's own loss beside DPO's.
    rounding: the grid that weights are rounded to whenever the model computes (`int4-g128`), as the exporter will.
    then_data: what is learnt from step `then_from` on. short_every: every such step cuts its windows to the context
    before LongRoPE, so that it is not forgotten; 0 for none. offload: the optimizer lives in the processor's memory.
    samples: texts that each saved state goes on with, to be read. spike: nats above the mean of the last losses at
    which a batch is left out. ours: the fields that the system's paper does not give,
    so that we chose them.
    """

    name: str
    model: AnyConfig
    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    final_learning_rate: float
    warmup_steps: int
    weight_decay: float
    schedule: str = "cosine"
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    gradient_clipping: float = 1.0
    dropout: float = 0.0
    precision: str = "bf16"  # matrix products; weights and optimizer stay in float32
    micro_batch_size: int | None = None
    zero_stage: int = 0
    checkpoint_activations: bool = False
    documents_apart: bool = False
    init_from: str | None = None
    objective: str = "pretrain"
    teacher: str | None = None
    distillation: float = 1.0
    beta: float = 0.1
    imitation: float = 0.0
    rounding: str | None = None
    then_data: str | None = None
    then_from: int = 0
    short_every: int = 0
    offload: bool = False
    samples: int = 2
    spike: float = 2.0
    seed: int = 0
    save_every: int = 100
    eval_windows: int = 32
    corpus: str = "stdlib"
    tokenizer: str | None = None  # folder; None trains one on the corpus
    data: str | None = None  # folder of shards; None tokenises the corpus
    ours: tuple[str, ...] = ()

    @property
    def tokens(self) -> int:
        """Tokens that it trains on, at most: examples may fill less. Of DPO's pairs, both texts."""
        return self.steps * self.batch_size * self.sequence_length * self.texts

    @property
    def frozen(self) -> str | None:
        """Where the model lies that is learnt from, or that DPO compares with."""
        return self.init_from if self.objective == "dpo" else self.teacher

    @property
    def texts(self) -> int:
        """Of a unit of the batch: one, or a preferred and a rejected one."""
        return 2 if self.objective == "dpo" else 1


def apply_settings(recipe: Recipe, settings: list[str]) -> Recipe:
    """A recipe with `key=value` settings applied, checked. Raises UsageError, with the nearest name."""
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator:
            raise UsageError(f"--set {setting!r} should be key=value")
        if key == "model":
            recipe = dataclasses.replace(recipe, model=read_config(Path(value)))  # type: ignore[arg-type]
        elif key.startswith("model."):
            recipe = dataclasses.replace(recipe, model=_replace(recipe.model, key.removeprefix("model."), value))
        else:
            recipe = _replace(recipe, key, value)
    check(recipe)
    return recipe


def _replace(target: Any, key: str, text: str) -> Any:
    fields = {f.name for f in dataclasses.fields(target)} - {"name", "model", "ours"}
    if key not in fields:
        raise UsageError(f"no setting {key!r}{nearest(key, fields)}")
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


def nearest(name: str, known: Collection[str]) -> str:
    """A hint at the closest of some names, nothing where none is close."""
    close = difflib.get_close_matches(name, list(known), 1, 0.4)
    return f" (did you mean {close[0]}?)" if close else ""


def check(r: Recipe) -> None:
    """Raise UsageError for what no run can do."""
    try:
        parse_config(r.model.to_json(), Path("--set model"))
    except PhiError as e:
        raise UsageError(str(e)) from None
    bounds: dict[str, float] = {
        "beta1": 1,
        "beta2": 1,
        "weight_decay": 100,
        "final_learning_rate": 100,
        "warmup_steps": 2**31,
    }
    bounds |= {
        "distillation": 1 + 1e-9,
        "imitation": 1e6,
        "then_from": max(1, r.steps),
        "short_every": 1e9,
        "samples": 1000,
    }
    for name, most in (bounds | {"seed": 2**63, "gradient_clipping": 1e9, "dropout": 1, "zero_stage": 4}).items():
        if not 0 <= getattr(r, name) < most:
            raise UsageError(f"--set {name}={getattr(r, name)}: should be from 0 to below {most:g}")
    if not 0 <= r.distillation <= 1:
        raise UsageError(f"--set distillation={r.distillation}: should be from 0 to 1")
    positive = (
        "steps",
        "batch_size",
        "sequence_length",
        "learning_rate",
        "epsilon",
        "spike",
        "beta",
        "save_every",
        "eval_windows",
    )
    for name in positive:
        if not 0 < getattr(r, name) < math.inf:
            raise UsageError(f"--set {name}={getattr(r, name)}: should be above 0, and a number")
    if r.sequence_length < 2 or r.sequence_length > r.model.max_position_embeddings:
        raise UsageError(
            f"sequence_length {r.sequence_length} is not between 2 and the context of {r.model.max_position_embeddings}"
        )
    if r.micro_batch_size is not None and (r.micro_batch_size < 1 or r.batch_size % r.micro_batch_size):
        raise UsageError(f"micro_batch_size {r.micro_batch_size} does not divide batch_size {r.batch_size}")
    for name, known in (("precision", PRECISIONS), ("schedule", SCHEDULES), ("objective", OBJECTIVES)):
        if getattr(r, name) not in known:
            raise UsageError(f"{name} {getattr(r, name)!r} is none of {', '.join(known)}")
    if r.rounding is not None:
        parse_grid(r.rounding)
    original = getattr(r.model, "original_max_position_embeddings", None)
    if r.short_every and (original is None or r.sequence_length % original):
        raise UsageError(
            f"short_every cuts {r.sequence_length} tokens to a context before LongRoPE, which is {original}"
        )
    if r.offload and r.zero_stage == 0:
        raise UsageError("offload moves what ZeRO divides; set zero_stage to 1, 2 or 3 too")
    if r.short_every and r.objective != "pretrain":
        raise UsageError("short_every cuts a corpus's windows; examples keep their own lengths")
    if r.distillation != 1 and r.teacher is None:
        raise UsageError("distillation is a teacher's share of the loss; give teacher too")
    if r.imitation and r.objective != "dpo":
        raise UsageError("imitation stands beside dpo's loss; set objective=dpo too")
    if r.objective == "dpo" and r.teacher is not None:
        raise UsageError("dpo compares with the model it begins with: give no teacher")
    if (r.then_data is None) != (r.then_from == 0):
        raise UsageError("a second phase has both then_data and then_from")
