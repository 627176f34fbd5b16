"""A recipe: one complete, frozen configuration of a training run, by component.

`phi-train RECIPE --set optimizer.lr=1e-3` changes a field; `model.name` changes one of the architecture's, `model=CKPT`
takes that of a checkpoint. A recipe file (`.toml` or `.json`) names the recipe it begins with and what it changes.
"""

import dataclasses
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import msgspec
from msgspec.structs import replace

from phi_runtime.architecture.config import AnyConfig, parse_config, read_config
from phi_runtime.contract import Count, Size, StrictContract, convert, nearest
from phi_runtime.errors import PhiError, UsageError
from phi_runtime.package.hub import local_checkpoint
from phi_train.grid import parse_grid

_Positive = Annotated[float, msgspec.Meta(gt=0)]
_BelowOne = Annotated[float, msgspec.Meta(ge=0, lt=1)]
_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
Initializer = Literal["published", "fan_in"]  # see `models.initializer`
_Weight = Annotated[float, msgspec.Meta(ge=0, le=1e9)]


class Data(StrictContract, frozen=True, kw_only=True):
    """What it learns from.

    batch_size: sequences of an optimizer step, over all processes. sequence_length: tokens. corpus: `stdlib` or a
    folder of texts; read only where `tokenizer` or `shards` names no folder. shards: a data folder, or a mixture of
    them (.toml). separate_documents: packed documents do
    not attend to each other. phase2_shards: the data from step `phase2_step` on. short_context_interval: every such
    step cuts its windows to the context before LongRoPE, 0 for none. eval_windows: held-out sequences of an evaluation.
    """

    batch_size: Count
    sequence_length: Annotated[int, msgspec.Meta(ge=2)]
    corpus: str = "stdlib"
    tokenizer: str | None = None
    shards: str | None = None
    separate_documents: bool = False
    phase2_shards: str | None = None
    phase2_step: Size = 0
    short_context_interval: Size = 0
    eval_windows: Count = 32


class Optimizer(StrictContract, frozen=True, kw_only=True):
    """AdamW. max_grad_norm: gradients are clipped to it, 0 for never."""

    lr: _Positive
    weight_decay: Annotated[float, msgspec.Meta(ge=0, lt=100)]
    beta1: _BelowOne = 0.9
    beta2: _BelowOne = 0.95
    eps: _Positive = 1e-8
    max_grad_norm: _Weight = 1.0


class Schedule(StrictContract, frozen=True, kw_only=True):
    """The learning rate: a linear warm-up, then down to `final_lr` by `type`. steps: of the optimizer, in all."""

    steps: Count
    warmup_steps: Size
    final_lr: Annotated[float, msgspec.Meta(ge=0, lt=100)]
    type: Literal["cosine", "linear", "constant"] = "cosine"


class Parallelism(StrictContract, frozen=True, kw_only=True):
    """How a step is computed; nothing here changes what is learned, but for rounding.

    precision: of matrix products. "auto" is bf16 where the device has instructions for it, else fp32
    (`models.precision`). weights: what is computed with; under bf16 the optimizer has a float32 copy, which ZeRO's
    stages 1 to 3 divide. micro_batch_size: sequences that a process takes at a time, None for all of its share.
    zero_stage: of DeepSpeed's ZeRO. gradient_checkpointing: activations of a layer are computed
    again in the backward pass, all of them or, with "selective", the cheap ones (`models.recompute`).
    offload_optimizer: its state lies in the processor's memory. compile: layers by torch.compile;
    "auto" where that is sooner done (`trainer.setup.compiled`).
    """

    precision: Literal["auto", "bf16", "fp16", "fp32"] = "auto"
    weights: Literal["fp32", "bf16"] = "fp32"
    micro_batch_size: Count | None = None
    zero_stage: Annotated[int, msgspec.Meta(ge=0, le=3)] = 0
    gradient_checkpointing: bool | Literal["selective"] = False
    offload_optimizer: bool = False
    compile: bool | Literal["auto"] = "auto"


class Objective(StrictContract, frozen=True, kw_only=True):
    """What a step minimises.

    type: the loss of the next token (pretrain), of the assistant's tokens (sft), or of preferences (dpo). dropout: of
    attention's weights and of what is added to the residual stream. teacher: a checkpoint whose distributions are
    learned, with the share `distillation` of the loss. dpo_beta: DPO's beta. nll_weight: of the preferred answer's own
    loss beside DPO's. qat: the grid of quantisation-aware training (`int4-g128`); the forward pass sees weights rounded
    to it. lora_rank: of the differences that are learnt while the weights stay as they are (arXiv:2106.09685), 0 for
    the weights themselves; lora_alpha: these differences are multiplied by lora_alpha / lora_rank. lora_base: the
    grid of four bits that the weights beneath are kept in (`int4-g32`; arXiv:2305.14314), None for as they are.
    """

    type: Literal["pretrain", "sft", "dpo"] = "pretrain"
    dropout: _BelowOne = 0.0
    teacher: str | None = None
    distillation: _Share = 1.0
    dpo_beta: _Positive = 0.1
    nll_weight: _Weight = 0.0
    qat: str | None = None
    lora_rank: Annotated[int, msgspec.Meta(ge=0)] = 0
    lora_alpha: _Positive = 32.0
    lora_base: str | None = None


class _Settings(StrictContract, frozen=True, kw_only=True):
    """All of a recipe but the architecture."""

    name: str
    data: Data
    optimizer: Optimizer
    schedule: Schedule
    parallelism: Parallelism = Parallelism()
    objective: Objective = Objective()
    init_from: str | None = None
    initializer: Initializer = "published"
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**63 - 1)] = 0
    save_every: Count = 100
    samples: Annotated[int, msgspec.Meta(ge=0, lt=1000)] = 2
    loss_spike_threshold: _Positive = 2.0
    assumed: tuple[str, ...] = ()


class RecipeFile(_Settings, frozen=True, kw_only=True):
    """A whole recipe as a file holds it. model: the content of a `config.json`."""

    model: dict[str, Any]


class Recipe(_Settings, frozen=True, kw_only=True):
    """Everything that decides a training run.

    init_from: the checkpoint to begin with. initializer: how weights are drawn where there is none, "fan_in" for models
    far narrower than the published (`models.initializer`). save_every: steps between saved states. samples: texts that
    each saved state continues, to be read. loss_spike_threshold: a batch whose loss is that many nats above the mean of
    the last ones is left out. assumed: the fields that the system's paper does not give, so that we chose them.
    """

    model: AnyConfig

    @property
    def tokens(self) -> int:
        """Tokens that it trains on, at most: examples may fill less. Of DPO's pairs, both texts."""
        return self.schedule.steps * self.data.batch_size * self.data.sequence_length * self.texts

    @property
    def frozen(self) -> str | None:
        """Where the frozen model lies: the teacher, or DPO's reference."""
        return self.init_from if self.objective.type == "dpo" else self.objective.teacher

    @property
    def texts(self) -> int:
        """Of a unit of the batch: one, or a preferred and a rejected one."""
        return 2 if self.objective.type == "dpo" else 1


# Names of version 0.1, which had no components.
RENAMED = {
    "steps": "schedule.steps", "warmup_steps": "schedule.warmup_steps", "schedule": "schedule.type",
    "final_learning_rate": "schedule.final_lr", "batch_size": "data.batch_size",
    "sequence_length": "data.sequence_length", "corpus": "data.corpus", "tokenizer": "data.tokenizer",
    "data": "data.shards", "documents_apart": "data.separate_documents", "then_data": "data.phase2_shards",
    "then_from": "data.phase2_step", "short_every": "data.short_context_interval", "eval_windows": "data.eval_windows",
    "learning_rate": "optimizer.lr", "weight_decay": "optimizer.weight_decay", "beta1": "optimizer.beta1",
    "beta2": "optimizer.beta2", "epsilon": "optimizer.eps", "gradient_clipping": "optimizer.max_grad_norm",
    "precision": "parallelism.precision", "micro_batch_size": "parallelism.micro_batch_size",
    "zero_stage": "parallelism.zero_stage", "checkpoint_activations": "parallelism.gradient_checkpointing",
    "offload": "parallelism.offload_optimizer", "objective": "objective.type", "dropout": "objective.dropout",
    "teacher": "objective.teacher", "distillation": "objective.distillation", "beta": "objective.dpo_beta",
    "imitation": "objective.nll_weight", "rounding": "objective.qat", "spike": "loss_spike_threshold",
}  # fmt: skip


def vary(recipe: Recipe, **changes: Any) -> Recipe:
    """A recipe with other values; a dictionary changes fields of a component: `vary(r, optimizer={"lr": 1e-3})`."""
    whole = {k: replace(getattr(recipe, k), **v) if isinstance(v, dict) else v for k, v in changes.items()}
    return replace(recipe, **whole)


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """A recipe as a file holds it."""
    settings = {name: getattr(recipe, name) for name in recipe.__struct_fields__ if name != "model"}
    values: dict[str, Any] = msgspec.to_builtins(settings)
    return values | {"model": recipe.model.to_json()}


def from_dict(values: dict[str, Any], where: str = "recipe", strict: bool = True) -> Recipe:
    """A recipe from what a file holds, checked. strict: whether text does not stand for numbers.

    Raises UsageError that names the field.
    """
    try:
        f = convert(values, RecipeFile, strict)
        model = parse_config(f.model, Path(where))
    except ValueError as e:
        raise UsageError(f"{where}: {e}") from None
    except PhiError as e:
        raise UsageError(str(e)) from None
    settings = {name: getattr(f, name) for name in f.__struct_fields__ if name != "model"}
    recipe = Recipe(**settings, model=model)  # type: ignore[arg-type]
    check(recipe)
    return recipe


def read_recipe_file(path: Path) -> tuple[str | None, dict[str, Any]]:
    """The recipe that a file begins with, if it names one, and what it changes. Raises UsageError."""
    try:
        if path.suffix == ".toml":
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        else:
            values = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; name a recipe, or a .toml or .json file") from None
    except (ValueError, msgspec.DecodeError, RecursionError) as e:
        raise UsageError(f"{path}: is not valid {path.suffix[1:].upper()} ({e})") from None
    base = values.pop("recipe", None)
    if base is not None and not isinstance(base, str):
        raise UsageError(f"{path}: recipe: should be the name of a recipe")
    return base, values


def merge(recipe: Recipe, changes: dict[str, Any]) -> dict[str, Any]:
    """A recipe's values with those of a file over them, component by component."""
    values = to_dict(recipe)
    for key, value in changes.items():
        both = isinstance(values.get(key), dict) and isinstance(value, dict)
        values[key] = values[key] | value if both else value
    return values


def apply_settings(recipe: Recipe, settings: list[str]) -> Recipe:
    """A recipe with `key=value` settings applied, checked. Raises UsageError, with the nearest name."""
    values = to_dict(recipe)
    model = recipe.model
    for setting in settings:
        key, separator, text = setting.partition("=")
        if not separator:
            raise UsageError(f"--set {setting!r} should be key=value")
        if key == "model":
            model = read_config(local_checkpoint(text, config_only=True))  # type: ignore[assignment]
        elif key.startswith("model."):
            model = _change_model(model, key, text)
        else:
            *room, name = key.split(".")
            place = values
            if key not in SETTINGS:
                raise UsageError(f"no setting {key!r}{_nearest_setting(key)}")
            for part in room:
                place = place[part]
            place[name] = None if text.lower() == "none" else text
    values["model"] = model.to_json()
    return from_dict(values, "--set", strict=False)


def _change_model(model: AnyConfig, key: str, text: str) -> AnyConfig:
    name, hints = key.removeprefix("model."), get_type_hints(type(model))
    if name not in hints:
        raise UsageError(f"no setting {key!r}{nearest(name, hints)}")
    try:
        value = convert(None if text.lower() == "none" else text, hints[name], strict=False)
    except ValueError as e:
        raise UsageError(f"--set {key}={text}: {e}") from None
    return dataclasses.replace(model, **{name: value})


def _settings(kind: type[msgspec.Struct], room: str = "") -> list[str]:
    found = []
    for field in msgspec.structs.fields(kind):
        inner = isinstance(field.type, type) and issubclass(field.type, msgspec.Struct)
        found += _settings(field.type, f"{field.name}.") if inner else [room + field.name]
    return found


SETTINGS = [n for n in _settings(_Settings) if n not in ("name", "assumed")]


def _nearest_setting(key: str) -> str:
    """A hint: an old name's new one, a bare name's full one, or the closest."""
    same = [n for n in SETTINGS if n.rpartition(".")[2] == key]
    found = RENAMED.get(key) or (same[0] if same else None)
    return f" (did you mean {found}?)" if found else nearest(key, SETTINGS)


def check(r: Recipe) -> None:
    """Raise UsageError for components that do not go together."""
    d, o, p = r.data, r.objective, r.parallelism
    context = r.model.max_position_embeddings
    if d.sequence_length > context:
        raise UsageError(f"data.sequence_length {d.sequence_length} is not between 2 and the context of {context}")
    if p.micro_batch_size is not None and d.batch_size % p.micro_batch_size:
        raise UsageError(
            f"parallelism.micro_batch_size {p.micro_batch_size} does not divide data.batch_size {d.batch_size}"
        )
    if o.qat is not None:
        parse_grid(o.qat)
    original = getattr(r.model, "original_max_position_embeddings", None)
    if d.short_context_interval and (original is None or d.sequence_length % original):
        raise UsageError(
            f"data.short_context_interval cuts {d.sequence_length} tokens to a context before LongRoPE, "
            f"which is {original}"
        )
    if p.offload_optimizer and p.zero_stage == 0:
        raise UsageError(
            "parallelism.offload_optimizer moves what ZeRO divides; set parallelism.zero_stage to 1, 2 or 3"
        )
    if p.weights == "bf16" and (p.zero_stage == 0 or p.precision in ("fp16", "fp32")):
        raise UsageError(
            "parallelism.weights=bf16 has its float32 copy in ZeRO and computes in bf16; set parallelism.zero_stage to "
            "1, 2 or 3 and parallelism.precision to auto or bf16"
        )
    if o.lora_rank and (o.qat is not None or p.zero_stage == 3):
        raise UsageError(
            "objective.lora_rank leaves the weights as they are: set no objective.qat, and parallelism.zero_stage to "
            "at most 2"
        )
    if o.lora_base is not None and (not o.lora_rank or parse_grid(o.lora_base)[0] != 4):
        raise UsageError(
            "objective.lora_base keeps what an adapter learns beside in four bits: set objective.lora_rank, and a grid "
            "such as int4-g32"
        )
    if d.short_context_interval and o.type != "pretrain":
        raise UsageError("data.short_context_interval cuts a corpus's windows; examples keep their own lengths")
    if o.distillation != 1 and o.teacher is None:
        raise UsageError("objective.distillation is a teacher's share of the loss; give objective.teacher too")
    if o.nll_weight and o.type != "dpo":
        raise UsageError("objective.nll_weight stands beside dpo's loss; set objective.type=dpo too")
    if o.type == "dpo" and o.teacher is not None:
        raise UsageError("dpo compares with the model it begins with: give no objective.teacher")
    if (d.phase2_shards is None) != (d.phase2_step == 0):
        raise UsageError("a second phase has both data.phase2_shards and data.phase2_step")
    if d.phase2_step >= max(1, r.schedule.steps):
        raise UsageError(f"data.phase2_step {d.phase2_step} is not below schedule.steps {r.schedule.steps}")
