"""A process that trains arms of studies on one core, one after the other: `python -m phi_train.studies.worker`.

Reads a job per line of stdin, null at the end, and writes lines of what happens to stdout, all JSON. Training begins
with imports of seconds, so a process is not started for each arm.
"""

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

import torch

from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.contract import encode
from phi_runtime.errors import PhiError
from phi_train.recipes.config import Recipe, vary
from phi_train.studies.catalogue import get_study
from phi_train.studies.result import ArmResult
from phi_train.studies.study import Arm, arm_folder, block_parameters
from phi_train.trainer.engine import parting
from phi_train.trainer.loop import train


def main() -> None:
    """Until stdin ends."""
    said = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no line of ours

    def say(line: dict[str, Any]) -> None:
        said.write(json.dumps(line) + "\n")

    jobs: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_read, args=(jobs,), daemon=True).start()
    with parting():
        while (job := jobs.get()) is not None:
            try:
                say({"result": json.loads(encode(run_arm(job, say)))})
            except PhiError as e:
                say({"error": str(e)})


def _read(jobs: "queue.SimpleQueue[dict[str, Any] | None]") -> None:
    """Jobs from stdin. Where it ends with a job under way the parent is gone: another run may begin at any time."""
    for line in sys.stdin:
        job = json.loads(line)
        if job is None:
            jobs.put(None)
            return
        jobs.put(job)
    os._exit(1)


def run_arm(job: dict[str, Any], say: Any) -> ArmResult:
    """Train and measure. A training that was begun goes on."""
    study, folder = get_study(job["study"]), Path(job["folder"])
    arm = next(a for a in study.arms(job["scale"]) if a.name == job["arm"])
    data = folder / "data" / f"seed-{job['seed']}"
    recipe = _placed(arm, job["seed"], data, folder)
    out = folder / arm_folder(arm.name, job["seed"])
    summary = train(recipe, out, lambda what, step, *_: say({"step": step}))
    # The same draws whatever was trained in this process before.
    torch.manual_seed(job["seed"])
    metrics = study.measure(job["scale"], job["seed"], data, out)
    return ArmResult(
        arm=arm.name,
        seed=job["seed"],
        parameters=summary.parameters,
        block_parameters=block_parameters(recipe.model),
        steps=summary.steps,
        tokens=summary.tokens,
        seconds=summary.seconds,
        heldout_loss=summary.final_loss,
        metrics=metrics,
    )


def _placed(arm: Arm, seed: int, data: Path, folder: Path) -> Recipe:
    """The arm's recipe with its seed and the folders of this run."""
    d = arm.recipe.data
    places = {"tokenizer": str(data / "tokenizer"), "shards": str(data / (d.shards or "shards"))}
    if d.phase2_shards is not None:
        places["phase2_shards"] = str(data / d.phase2_shards)
    begins = None if arm.after is None else folder / arm_folder(arm.after, seed)
    if begins is not None and arm.begin is not None:
        made = folder / "arms" / arm.name / f"begins-{seed}"
        if not made.exists():
            arm.begin(data, begins, made)
        begins = made
    if begins is None:
        return vary(arm.recipe, seed=seed, data=places)
    return vary(arm.recipe, seed=seed, data=places, init_from=str(begins), model=open_checkpoint(begins).config)


if __name__ == "__main__":
    main()
