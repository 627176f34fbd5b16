"""LongRoPE (2402.13753) as phi-3 uses it: eight times the context by searched factors, YaRN's, PI's and none."""

from functools import partial
from pathlib import Path

from phi_train.checkpoints.extend import METHODS, extend
from phi_train.data.shards import open_data
from phi_train.recipes.config import Recipe, vary
from phi_train.studies.answers import Student
from phi_train.studies.code_texts import VOCABULARY, write_code
from phi_train.studies.study import Arm, Comparison, Control, Scale, Study, small_recipe

_SHORT, _LONG = 128, 1024
# Rounds of the search and texts that judge it; the published one takes 40 rounds.
_SEARCH: dict[Scale, tuple[int, int]] = {"smoke": (1, 1), "demo": (8, 4)}


class LongRopeStudy(Study):
    """See the module."""

    name = "longrope"
    claim = "Searched factors extend the context eight times better than YaRN's, PI's or none, and keep the short one."
    source = "LongRoPE, arXiv:2402.13753; phi-3, arXiv:2404.14219"
    stand_in = "0.3 M parameters, 128 tokens to 1,024, code of Python's standard library"
    would_show = "a larger model, or more windows of the old length"
    comparisons = (
        *(Comparison("far", "searched", m) for m in METHODS if m != "searched"),
        Comparison("far", "yarn", "pi", of_claim=False),
        Comparison("near", "searched", "none", of_claim=False),
        Comparison("near", "searched", "base", kept_within=0.05),
    )
    controls = (Control("near", "base", least=-6.0),)

    def arms(self, scale: Scale) -> tuple[Arm, ...]:
        """See `Study`."""
        first, then = {"smoke": (20, 2), "demo": (900, 80)}[scale]
        base = small_recipe("base", VOCABULARY, 64, 4, _SHORT, first, 16)
        # The model's positions come from the checkpoint that `extend` writes, its factors too.
        return (
            Arm("base", base),
            *(Arm(m, _longer(base, m, then), "base", partial(_extended, m, *_SEARCH[scale])) for m in METHODS),
        )

    def make_data(self, scale: Scale, seed: int, folder: Path) -> None:
        """See `Study`."""
        write_code(seed, {"smoke": 400_000, "demo": 4_000_000}[scale], folder)

    def measure(self, scale: Scale, seed: int, data: Path, checkpoint: Path) -> dict[str, float]:
        """See `Study`."""
        student, opened = Student(checkpoint), open_data(data / "shards")
        near = student.log_likelihood(opened.heldout_windows(_SHORT, 16 if scale == "smoke" else 200))
        far = near
        if student.context >= _LONG:
            windows = opened.heldout_windows(_LONG, 2 if scale == "smoke" else 60)
            far = student.log_likelihood(windows, _LONG - _SHORT)
        return {"far": far, "near": near}


def _longer(base: Recipe, name: str, steps: int) -> Recipe:
    """Every second step on windows of the old length: long ones alone cost 0.1 nats there."""
    lr = base.optimizer.lr / 10
    return vary(
        base,
        name=name,
        data={"sequence_length": _LONG, "batch_size": 2, "short_context_interval": 2},
        schedule={"steps": steps, "warmup_steps": 0, "final_lr": lr / 10},
        optimizer={"lr": lr},
    )


def _extended(method: str, rounds: int, windows: int, data: Path, checkpoint: Path, out: Path) -> None:
    extend(checkpoint, _LONG, data / "shards", out, method, windows, rounds)
