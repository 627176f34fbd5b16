"""Results of a study: what each arm reached in each seed, and whether that shows the claim."""

from collections.abc import Sequence
from typing import Protocol

from phi_runtime.contract import Contract
from phi_train.studies.study import Comparison, Control

LEAST_SEEDS = 3


class Claimed(Protocol):
    """What is judged: a `Study`, or what others made that trains nothing of its own."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def claim(self) -> str: ...  # noqa: D102
    @property
    def source(self) -> str: ...  # noqa: D102
    @property
    def stand_in(self) -> str: ...  # noqa: D102
    @property
    def would_show(self) -> str: ...  # noqa: D102
    @property
    def comparisons(self) -> tuple[Comparison, ...]: ...  # noqa: D102
    @property
    def controls(self) -> tuple[Control, ...]: ...  # noqa: D102


class ArmResult(Contract, frozen=True):
    """One training of an arm. parameters: without the embedding's and head's rows in `block_parameters`. seconds: of
    training. steps, tokens: its own, without those of the arm that it began with.
    """

    arm: str
    seed: int
    parameters: int
    block_parameters: int
    steps: int
    tokens: int
    seconds: float
    heldout_loss: float
    metrics: dict[str, float]


class Judged(Contract, frozen=True):
    """A comparison. Both arms of a seed have the same data. effect: mean over seeds of `more` minus `less`; spread: the
    largest of these differences minus the smallest. shown: in each seed `more` has more, and the effect is larger than
    its spread, or, with `kept_within`, no seed loses more than that; None with fewer than three seeds.
    """

    metric: str
    more: str
    less: str
    of_claim: bool
    effect: float
    spread: float
    shown: bool | None
    kept_within: float | None = None


class Checked(Contract, frozen=True):
    """A control. values: by seed."""

    metric: str
    arm: str
    least: float | None
    most: float | None
    values: tuple[float, ...]
    holds: bool


class StudyResult(Contract, frozen=True):
    """A whole study. shown: None at the scale `smoke` or with fewer than three seeds, False also where a control
    failed.
    """

    name: str
    claim: str
    source: str
    stand_in: str
    scale: str
    version: str
    seeds: tuple[int, ...]
    seconds: float
    arms: tuple[ArmResult, ...]
    comparisons: tuple[Judged, ...]
    controls: tuple[Checked, ...]
    shown: bool | None
    paragraph: str


def judge(study: Claimed, scale: str, version: str, arms: Sequence[ArmResult]) -> StudyResult:
    """Compare what the arms reached."""
    seeds = tuple(sorted({a.seed for a in arms}))
    found = {(a.arm, a.seed): a.metrics for a in arms}
    enough = scale == "demo" and len(seeds) >= LEAST_SEEDS
    comparisons = tuple(_judged(c, found, seeds, enough) for c in study.comparisons)
    controls = tuple(_checked(c, found, seeds) for c in study.controls)
    shown = None
    if enough:
        shown = all(c.holds for c in controls) and all(bool(c.shown) for c in comparisons if c.of_claim)
    return StudyResult(
        study.name, study.claim, study.source, study.stand_in, scale, version, seeds, sum(a.seconds for a in arms),
        tuple(arms), comparisons, controls, shown, _paragraph(study, scale, seeds, comparisons, controls, shown, found),
    )  # fmt: skip


_Found = dict[tuple[str, int], dict[str, float]]


def _values(metric: str, arm: str, found: _Found, seeds: Sequence[int]) -> list[float]:
    return [found[arm, seed][metric] for seed in seeds]


def _judged(c: Comparison, found: _Found, seeds: Sequence[int], enough: bool) -> Judged:
    more, less = _values(c.metric, c.more, found, seeds), _values(c.metric, c.less, found, seeds)
    differences = [a - b for a, b in zip(more, less, strict=True)]
    effect = sum(differences) / len(differences)
    spread = max(differences) - min(differences)
    shown = min(differences) > 0 and effect > spread if c.kept_within is None else min(differences) >= -c.kept_within
    return Judged(c.metric, c.more, c.less, c.of_claim, effect, spread, shown if enough else None, c.kept_within)


def _checked(c: Control, found: _Found, seeds: Sequence[int]) -> Checked:
    values = tuple(_values(c.metric, c.arm, found, seeds))
    least = None if c.least == float("-inf") else c.least
    most = None if c.most == float("inf") else c.most
    return Checked(c.metric, c.arm, least, most, values, all(c.least <= v <= c.most for v in values))


def _paragraph(
    study: Claimed,
    scale: str,
    seeds: Sequence[int],
    comparisons: Sequence[Judged],
    controls: Sequence[Checked],
    shown: bool | None,
    found: _Found,
) -> str:
    verdict = {True: "Shown.", False: "Not shown.", None: "Not judged: that takes the scale demo and three seeds."}[
        shown
    ]
    parts = [f"{study.claim} ({study.source}) {verdict}", f"Stand-ins: {study.stand_in}."]
    for c in comparisons:
        more = sum(_values(c.metric, c.more, found, seeds)) / len(seeds)
        less = sum(_values(c.metric, c.less, found, seeds)) / len(seeds)
        word = {True: "shown", False: "not shown", None: "not judged"}[c.shown]
        beside = "" if c.of_claim else "beside the claim, "
        word += "" if c.kept_within is None else f" (to be kept within {c.kept_within:g})"
        parts.append(
            f"{c.metric}: {more:.3f} for {c.more}, {less:.3f} for {c.less}; {beside}effect {c.effect:+.3f}, spread "
            f"{c.spread:.3f}, {word}."
        )
    for k in controls:
        if not k.holds and shown is not None:
            bounds = [f"at least {k.least:g}"] if k.least is not None else []
            bounds += [f"at most {k.most:g}"] if k.most is not None else []
            said = ", ".join(f"{v:.3f}" for v in k.values)
            parts.append(f"A control failed: {k.metric} of {k.arm} is {said}, and should be {' and '.join(bounds)}.")
    if shown is False:
        parts.append(f"It would take {study.would_show}.")
    return " ".join(parts)
