"""Run a study: data of each seed, arms side by side in single-threaded processes, one result.

What is done is kept: a second run of the same study goes on, in the middle of an arm too.
"""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phi_runtime.backends import cores
from phi_runtime.contract import StrictContract, encode, read_record
from phi_runtime.errors import OutputExistsError, PhiError, UsageError
from phi_runtime.files import folder_beside, write_file
from phi_runtime.version import __version__
from phi_train.recipes.estimate import flops_per_token
from phi_train.studies.report import write_report
from phi_train.studies.result import ArmResult, StudyResult, judge
from phi_train.studies.study import Arm, Scale, Study, arm_folder

SETTINGS, RESULT = "study.json", "result.json"
_STEP_FLOPS = 8e8  # what the step of a model of no size takes, as operations

# Told: what happens, and the share of all work that is done.
Progress = Callable[[str, float], None]


class StudyError(PhiError):
    """A training of a study ended without a result."""


class Settings(StrictContract, frozen=True):
    """What a folder holds results of."""

    study: str
    scale: str
    seeds: tuple[int, ...]
    version: str


@dataclass(frozen=True)
class _Job:
    arm: Arm
    seed: int

    @property
    def work(self) -> float:
        """Operations, about."""
        r = self.arm.recipe
        return r.tokens * flops_per_token(r) + r.schedule.steps * _STEP_FLOPS

    @property
    def name(self) -> str:
        return f"{self.arm.name}, seed {self.seed}"


def run_study(
    study: Study,
    scale: Scale,
    out: Path,
    seeds: tuple[int, ...],
    workers: int | None = None,
    progress: Progress = lambda *_: None,
) -> StudyResult:
    """Into `out`: result.json, plot.png, index.html; the arms' checkpoints in arms/.

    workers: processes, as many as there are cores by default. Raises OutputExistsError for a folder of another study
    or other settings, UsageError for no seeds, StudyError for an arm that failed.
    """
    if not seeds or len(set(seeds)) != len(seeds):
        raise UsageError("a study takes one seed or more, each once")
    _claim(out, Settings(study.name, scale, seeds, __version__))
    if (out / RESULT).is_file():
        return read_record(out / RESULT, StudyResult, StudyError, "remove it to run the study anew")
    for seed in seeds:
        data = out / "data" / f"seed-{seed}"
        if not data.exists():
            progress(f"data of seed {seed}", 0.0)
            with folder_beside(data) as stage:
                study.make_data(scale, seed, stage)
                os.replace(stage, data)
    jobs = [_Job(arm, seed) for seed in seeds for arm in study.arms(scale)]
    found = _Runner(study, scale, out, jobs, progress).run(workers or cores())
    result = judge(study, scale, __version__, found)
    inside = "".join(study.look_inside(scale, seeds[0], out / arm_folder(a.name, seeds[0])) for a in study.arms(scale))
    write_report(result, out, inside)
    write_file(out / RESULT, encode(result) + "\n")
    return result


def _claim(out: Path, wanted: Settings) -> None:
    record = out / SETTINGS
    if record.is_file():
        there = read_record(record, Settings, StudyError, "choose another --out")
        for name in ("study", "scale", "seeds", "version"):
            if getattr(there, name) != getattr(wanted, name):
                raise OutputExistsError(
                    f"{out}: holds a study with {name} {getattr(there, name)}, not {getattr(wanted, name)}; choose "
                    "another --out"
                )
        return
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputExistsError(f"{out}: is there already and holds no study; choose another --out")
    write_file(record, encode(wanted) + "\n")


class _Runner:
    """Jobs to workers; a job whose arm begins with another's checkpoint waits for that."""

    def __init__(self, study: Study, scale: Scale, out: Path, jobs: list[_Job], progress: Progress) -> None:
        self._study, self._scale, self._out, self._progress = study, scale, out, progress
        self._jobs = jobs
        self._work = sum(job.work for job in jobs)
        self._done: dict[tuple[str, int], ArmResult] = {}
        self._lock = threading.Condition()
        self._shares: dict[tuple[str, int], float] = {}
        self._error: BaseException | None = None
        self._live: list[subprocess.Popen[str]] = []

    def run(self, workers: int) -> list[ArmResult]:
        """In the order of the jobs."""
        waiting = []
        for job in self._jobs:
            kept = self._kept(job)
            if kept.is_file():
                self._done[job.arm.name, job.seed] = read_record(kept, ArmResult, StudyError, "remove it")
                self._shares[job.arm.name, job.seed] = 1.0
            else:
                waiting.append(job)
        # The longest first, so that none is left alone at the end; one that others wait for before them.
        waiting.sort(key=lambda job: -job.work)
        threads = [threading.Thread(target=self._serve, args=(waiting, n)) for n in range(min(workers, len(waiting)))]
        for t in threads:
            t.start()
        try:
            for t in threads:
                t.join()
        except BaseException as e:  # Ctrl-C
            self._fail(e)
            for t in threads:
                t.join()
            raise
        if self._error is not None:
            raise self._error
        return [self._done[job.arm.name, job.seed] for job in self._jobs]

    def _serve(self, waiting: list[_Job], number: int) -> None:
        try:
            with _worker(self._out / f"worker-{number}.log") as process:
                self._live.append(process)
                while (job := self._next(waiting)) is not None:
                    self._train(process, job)
        except BaseException as e:
            self._fail(e)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            for process in self._live:  # what they trained goes on another time
                process.kill()
            self._lock.notify_all()

    def _next(self, waiting: list[_Job]) -> _Job | None:
        with self._lock:
            while waiting and self._error is None:
                for job in waiting:
                    if job.arm.after is None or (job.arm.after, job.seed) in self._done:
                        waiting.remove(job)
                        return job
                self._lock.wait()
            return None

    def _train(self, process: "subprocess.Popen[str]", job: _Job) -> None:
        assert process.stdin is not None and process.stdout is not None
        said = {"study": self._study.name, "scale": self._scale, "arm": job.arm.name, "seed": job.seed}
        process.stdin.write(json.dumps({**said, "folder": str(self._out)}) + "\n")
        process.stdin.flush()
        for line in process.stdout:
            told: dict[str, Any] = json.loads(line)
            if "step" in told:
                self._tell(job, told["step"] / job.arm.recipe.schedule.steps)
            elif "error" in told:
                raise StudyError(f"{self._study.name}, {job.name}: {told['error']}")
            else:
                kept = self._kept(job)
                write_file(kept, json.dumps(told["result"]) + "\n")
                with self._lock:
                    found = read_record(kept, ArmResult, StudyError, "remove it")
                    self._done[job.arm.name, job.seed] = found
                    self._lock.notify_all()
                self._tell(job, 1.0)
                return
        raise StudyError(
            f"{self._study.name}, {job.name}: its process ended; see {self._out}/worker-*.log, and give the command "
            "again to go on"
        )

    def _tell(self, job: _Job, share: float) -> None:
        with self._lock:
            self._shares[job.arm.name, job.seed] = share
            done = sum(self._shares.get((j.arm.name, j.seed), 0.0) * j.work for j in self._jobs)
            self._progress(job.name, done / self._work)

    def _kept(self, job: _Job) -> Path:
        return (self._out / arm_folder(job.arm.name, job.seed)).with_suffix(".json")


@contextmanager
def _worker(log: Path) -> "Iterator[subprocess.Popen[str]]":
    """A process on one core; ended when the block is left."""
    # Two processes of one thread each beat one of two threads.
    one = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "0"}
    with open(log, "ab") as f:
        process = subprocess.Popen(
            [sys.executable, "-m", "phi_train.studies.worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=f,
            text=True,
            env=os.environ | one,
            start_new_session=True,  # Ctrl-C is for us, who then end it
        )
    assert process.stdin is not None and process.stdout is not None
    try:
        yield process
        process.stdin.write("null\n")
        process.stdin.close()
        process.wait(30)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
