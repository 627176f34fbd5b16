"""The study int4: four bits keep a benchmark, calibrated or not (phi-3, arXiv:2404.14219, section 2).

    phi-bench suite int4 STUDY --arm ARM --metric METRIC --out DIR

STUDY is a folder of `phi-train study`, at the scale demo with three seeds. The checkpoint of ARM in each seed is
exported, the weights of the bundle are read back, and the study's own measure asks the model that has them. Writes
what a study writes: result.json, plot.png, index.html.
"""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from phi_export.calibrate.calibration import CalibrationText
from phi_export.formats import get_format
from phi_export.pipeline import export
from phi_export.quantize.uniform import dequantize_rows, round_rows
from phi_runtime.architecture.checkpoint import Checkpoint, open_checkpoint
from phi_runtime.contract import encode, read_record
from phi_runtime.errors import BenchmarkError, NotFoundError, OutputExistsError, UsageError
from phi_runtime.files import write_file
from phi_runtime.package.manifest import read_manifest
from phi_runtime.version import __version__
from phi_train.checkpoints.write import write_checkpoint
from phi_train.studies.catalogue import get_study
from phi_train.studies.report import write_report
from phi_train.studies.result import ArmResult, StudyResult, judge
from phi_train.studies.study import Comparison, Control, Scale, arm_folder

MARGIN = 0.02  # of the metric that four bits may lose
LESS = f"unquantised, {MARGIN} less"
_FORMAT, _WINDOWS, _BLOCK = "onnx", 16, 32
Weights = Callable[[str], np.ndarray]


@dataclass(frozen=True)
class Kept:
    """What is judged (see `phi_train.studies.study.Study`): an arm keeps the metric if it has more than MARGIN less."""

    metric: str
    stand_in: str
    name: str = "int4"
    claim: str = f"Four bits keep the benchmark within {MARGIN}, calibrated or not."
    source: str = "phi-3, arXiv:2404.14219, section 2"
    would_show: str = "more questions, or a larger model"

    @property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Both ways of four bits against the unquantised model with the margin taken off; and beside each other."""
        return (
            Comparison(self.metric, "int4", LESS),
            Comparison(self.metric, "int4, calibrated", LESS),
            Comparison(self.metric, "int4, calibrated", "int4", of_claim=False),
        )

    @property
    def controls(self) -> tuple[Control, ...]:
        """There is something to lose, and two bits lose more than the margin of it."""
        return (Control(self.metric, "unquantised", least=0.5), Control("lost", "two bits", least=MARGIN))


def main(argv: list[str]) -> None:
    """Export, read back and ask, seed by seed."""
    p = argparse.ArgumentParser("phi-bench suite int4", description=(__doc__ or "").splitlines()[0])
    p.add_argument("study", type=Path, help="folder of a study")
    p.add_argument("--arm", required=True, help="whose checkpoints are exported")
    p.add_argument("--metric", required=True, help="of the study, from 0 to 1")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    if args.out.exists():
        raise OutputExistsError(f"{args.out}: is there already; choose another --out")
    record = args.study / "result.json"
    if not record.is_file():
        raise NotFoundError(f"{record}: no such file; give the folder of a study that has ended")
    trained = read_record(record, StudyResult, BenchmarkError, "run the study anew")
    own = [a for a in trained.arms if a.arm == args.arm]
    for what, chosen, known in (
        ("arm", args.arm, dict.fromkeys(a.arm for a in trained.arms)),
        ("metric", args.metric, trained.arms[0].metrics),
    ):
        if chosen not in known:
            raise UsageError(f"{args.study}: has no {what} {chosen!r}; choose from {', '.join(known)}")
    args.out.mkdir(parents=True)
    found = [made for arm in own for made in asked(trained, arm, args.study, args.metric, args.out)]
    claim = Kept(args.metric, f"{args.arm} of the study {trained.name} ({trained.stand_in})")
    result = judge(claim, trained.scale, __version__, found)
    write_report(result, args.out)
    write_file(args.out / "result.json", encode(result) + "\n")
    print(result.paragraph)


def asked(trained: StudyResult, arm: ArmResult, study: Path, metric: str, out: Path) -> list[ArmResult]:
    """What a seed's model reaches with each kind of weights."""
    checkpoint = open_checkpoint(study / arm_folder(arm.arm, arm.seed))
    data = study / "data" / f"seed-{arm.seed}"
    kind = get_study(trained.name)
    scale: Scale = "demo" if trained.scale == "demo" else "smoke"
    (recipe,) = (a.recipe for a in kind.arms(scale) if a.name == arm.arm)
    text = CalibrationText(str(data / (recipe.data.shards or "shards") / "heldout.txt"), _WINDOWS)
    ways: dict[str, Weights] = {
        "int4": exported(checkpoint, out / "bundles" / f"plain-{arm.seed}", None),
        "int4, calibrated": exported(checkpoint, out / "bundles" / f"calibrated-{arm.seed}", text),
        "two bits": lambda name: two_bits(checkpoint.read(name)),
    }
    reached = {"unquantised": arm.metrics[metric]}
    for way, read in ways.items():
        folder = out / "models" / f"{way}-{arm.seed}"
        weights = {name: torch.from_numpy(np.array(read(name), np.float32)) for name in checkpoint.tensors}
        write_checkpoint(folder, checkpoint.config, weights, checkpoint.folder)
        torch.manual_seed(arm.seed)
        reached[way] = kind.measure(scale, arm.seed, data, folder)[metric]
        print(f"seed {arm.seed}, {way}: {metric} {reached[way]:.3f}, unquantised {reached['unquantised']:.3f}")
    reached[LESS] = reached["unquantised"] - MARGIN
    return [
        ArmResult(
            way, arm.seed, arm.parameters, arm.block_parameters, arm.steps, arm.tokens, 0.0, arm.heldout_loss,
            {metric: value, "lost": reached["unquantised"] - value},
        )
        for way, value in reached.items()
    ]  # fmt: skip


def exported(checkpoint: Checkpoint, out: Path, text: CalibrationText | None) -> Weights:
    """The weights of a bundle of four bits."""
    (made,) = export(checkpoint, out, (_FORMAT,), tokens=64, text=text, accept_loss=True)
    read: Weights = get_format(_FORMAT).read(made.folder, read_manifest(made.folder))
    return read


def two_bits(weight: np.ndarray) -> np.ndarray:
    """A matrix rounded to two bits in small blocks; a vector as it is."""
    if weight.ndim != 2:
        return weight
    found: np.ndarray = dequantize_rows(*round_rows(weight, 2, _BLOCK, None))
    return found
