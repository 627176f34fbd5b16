"""What a study is: arms that are trained alike but for one thing, what is measured on each, and what is compared."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

from phi_runtime.architecture.config import AnyConfig, Phi3Config, num_parameters
from phi_train.recipes.config import Data, Optimizer, Parallelism, Recipe, Schedule
from phi_train.recipes.published import tinystories as published_tinystories

Scale = Literal["smoke", "demo"]


@dataclass(frozen=True)
class Arm:
    """One training. `recipe`: its `data.shards` is a folder of the study's data. after: the arm whose checkpoint it
    begins with. begin: makes another checkpoint of that to begin with: (data, checkpoint, out).
    """

    name: str
    recipe: Recipe
    after: str | None = None
    begin: Callable[[Path, Path, Path], None] | None = None


@dataclass(frozen=True)
class Comparison:
    """`more` is expected to have more of a metric than `less`. of_claim: the finding rests on it; else it is shown
    beside. kept_within: not more is claimed, but that in no seed more than this is lost.
    """

    metric: str
    more: str
    less: str
    of_claim: bool = True
    kept_within: float | None = None


@dataclass(frozen=True)
class Control:
    """What must hold of an arm in each seed for the measure to mean anything: `metric` between `least` and `most`."""

    metric: str
    arm: str
    least: float = float("-inf")
    most: float = float("inf")


class Study(ABC):
    """A finding as an experiment.

    claim, source: what the paper says and where. stand_in: what takes the place of the paper's models and data.
    would_show: what would be needed where this is not enough. comparisons, controls: see there; both are judged at the
    scale `demo` alone.
    """

    name: ClassVar[str]
    claim: ClassVar[str]
    source: ClassVar[str]
    stand_in: ClassVar[str]
    would_show: ClassVar[str]
    comparisons: ClassVar[tuple[Comparison, ...]]
    controls: ClassVar[tuple[Control, ...]] = ()

    @abstractmethod
    def arms(self, scale: Scale) -> tuple[Arm, ...]:
        """All arms, one that begins with another's checkpoint behind that."""

    @abstractmethod
    def make_data(self, scale: Scale, seed: int, folder: Path) -> None:
        """Write `folder`/tokenizer and the folders of shards that the arms name. Deterministic."""

    @abstractmethod
    def measure(self, scale: Scale, seed: int, data: Path, checkpoint: Path) -> dict[str, float]:
        """Metrics of a trained arm, the same ones of each."""

    def look_inside(self, scale: Scale, seed: int, checkpoint: Path) -> str:
        """HTML for the study's page of what a trained arm holds; nothing unless a study says otherwise."""
        return ""


def arm_folder(arm: str, seed: int) -> Path:
    """Where an arm's run lies in a study's folder."""
    return Path("arms", arm, f"seed-{seed}")


def block_parameters(config: AnyConfig) -> int:
    """Without the rows of the embedding and of the head, where it has its own."""
    d = config.decoder()
    return num_parameters(config) - d.vocab_size * d.hidden_size * (1 if d.tied else 2)


def small_recipe(
    name: str,
    vocab_size: int,
    width: int,
    layers: int,
    length: int,
    steps: int,
    batch_size: int = 64,
    lr: float = 2e-3,
    shards: str = "shards",
    tinystories: bool = False,
) -> Recipe:
    """A Phi-3 of `width` and `layers`, or a model of TinyStories' architecture, heads of 16 dimensions, on sequences of
    `length` tokens. Sizes are ours.
    """
    heads = max(1, width // 16)
    model: AnyConfig
    if tinystories:
        model = replace(
            published_tinystories(width, layers),
            vocab_size=vocab_size,
            num_heads=heads,
            max_position_embeddings=length,
            bos_token_id=None,
            eos_token_id=None,
        )
    else:
        model = Phi3Config(
            vocab_size=vocab_size,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=length,
            rms_norm_eps=1e-5,
            rope_theta=10000.0,
            sliding_window=None,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    return Recipe(
        name=name,
        model=model,
        data=Data(batch_size=batch_size, sequence_length=length, shards=shards, eval_windows=64),
        optimizer=Optimizer(lr=lr, weight_decay=0.1),
        schedule=Schedule(steps=steps, warmup_steps=min(50, steps // 10), final_lr=lr / 10),
        parallelism=Parallelism(precision="fp32"),  # at these widths bf16 gains nothing
        save_every=max(1, steps // 4),
        samples=0,
    )
