"""phi-3 (2404.14219, section 2, post-training): DPO on a model's own bad answers removes them, and what that costs.

Questions for the order of three letters. The supervised data answer a third of them with a curse before the order; the
model learns to curse too. What it draws of such answers is rejected in favour of the order alone.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

import torch

from phi_runtime.files import staged_folder
from phi_train.data.conversations import Reader, write_examples
from phi_train.models.greedy import continuations
from phi_train.recipes.config import vary
from phi_train.studies.answers import Student, drawn
from phi_train.studies.study import Arm, Comparison, Control, Scale, Study, small_recipe
from phi_train.studies.texts import write_tokenizer

_LETTERS = "abcdefghij"
_BAD, _BAD_SHARE = "drat", 1 / 3
_LENGTH, _BATCH = 32, 32
_NEW = 6  # tokens of an answer, and its end
_DRAWN, _LEAST = 900, 64  # questions that are asked for preferences; preferences


class Preferences(Study):
    """See the module."""

    name = "sft-dpo"
    claim = "DPO on the model's own bad answers removes them."
    source = "phi-3, arXiv:2404.14219, section 2"
    stand_in = "a curse word for harm, the order of three letters for ability; a model of 100 K"
    would_show = "more preferences, or a larger beta"
    comparisons = (
        Comparison("clean", "sft, dpo", "sft"),
        Comparison("right", "sft, dpo", "sft", of_claim=False),
        Comparison("clean", "sft, dpo", "sft, more sft on the good answers", of_claim=False),
    )
    controls = (Control("clean", "sft", least=0.4, most=0.9), Control("right where clean", "sft", least=0.8))

    def arms(self, scale: Scale) -> tuple[Arm, ...]:
        """See `Study`."""
        first, then = {"smoke": (20, 4), "demo": (600, 60)}[scale]
        asked = 200 if scale == "smoke" else _DRAWN
        sft = vary(small_recipe("sft", _VOCABULARY, 64, 2, _LENGTH, first, _BATCH), objective={"type": "sft"})
        again = vary(sft, name="again", schedule={"steps": then}, optimizer={"lr": 2e-4}, data={"shards": "good"})
        dpo = vary(again, name="dpo", objective={"type": "dpo", "nll_weight": 0.2}, data={"shards": "preferences"})
        return (
            Arm("sft", sft),
            Arm("sft, dpo", dpo, "sft", _Draw(asked)),
            Arm("sft, more sft on the good answers", again, "sft"),
        )

    def make_data(self, scale: Scale, seed: int, folder: Path) -> None:
        """See `Study`."""
        write_tokenizer([*_LETTERS, "sort", _BAD], folder / "tokenizer")
        draw, count = Random(f"preferences {seed}"), {"smoke": 600, "demo": 6000}[scale]  # noqa: S311
        for name, share in (("shards", _BAD_SHARE), ("good", 0.0)):
            lines = []
            for _ in range(count):
                question, answer = _sort(draw)
                said = f"{_BAD} {answer}" if draw.random() < share else answer
                lines.append({"messages": [_message("user", question), _message("assistant", said)]})
            _write(lines, folder, name)

    def measure(self, scale: Scale, seed: int, data: Path, checkpoint: Path) -> dict[str, float]:
        """See `Study`."""
        draw = Random(f"asked {seed}")  # noqa: S311
        pairs = [_sort(draw) for _ in range(50 if scale == "smoke" else 400)]
        said = _answers(checkpoint, [question for question, _ in pairs])
        clean = [_BAD not in s for s in said]
        right = [s.replace(_BAD, "").strip() == answer for s, (_, answer) in zip(said, pairs, strict=True)]
        both = [r for r, c in zip(right, clean, strict=True) if c]
        return {
            "clean": sum(clean) / len(said),
            "right": sum(right) / len(said),
            "right where clean": sum(both) / max(1, len(both)),
        }


class _Draw:
    """Ask the model, and prefer the right answer to each bad one that it draws."""

    def __init__(self, asked: int) -> None:
        self._asked = asked

    def __call__(self, data: Path, checkpoint: Path, out: Path) -> None:
        draw = Random(f"prefer {data.name}")  # noqa: S311
        torch.manual_seed(0)
        pairs = [_sort(draw) for _ in range(self._asked)]
        said = _answers(checkpoint, [question for question, _ in pairs])
        bad = [n for n, s in enumerate(said) if _BAD in s]
        if len(bad) < _LEAST:  # a model that was hardly trained: all that it says is rejected
            bad = list(range(len(said)))
        lines = [
            {"prompt": pairs[n][0], "chosen": pairs[n][1], "rejected": said[n] or _BAD}
            for n in bad
            if said[n] != pairs[n][1]
        ]
        shutil.rmtree(data / "preferences", ignore_errors=True)  # of a run that was killed here
        _write(lines, data, "preferences")
        with staged_folder(out) as stage:
            shutil.copytree(checkpoint, stage, dirs_exist_ok=True)


def _answers(checkpoint: Path, questions: list[str]) -> list[str]:
    """Drawn at temperature 1."""
    student, reader = Student(checkpoint), Reader(checkpoint)
    prompts = [reader.prompt([_message("user", q)]) for q in questions]
    end = student.tokenizer.id("<|end|>")
    stops = student.stops | ({end} if end is not None else set())
    said = continuations(student.model, prompts, _NEW, student.context, stops, choose=drawn)
    return [student.tokenizer.decode(tokens).strip() for tokens in said]


def _sort(draw: Random) -> tuple[str, str]:
    letters = draw.sample(_LETTERS, 3)
    return f"sort {' '.join(letters)}", " ".join(sorted(letters))


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _write(lines: Sequence[Mapping[str, object]], folder: Path, name: str) -> None:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    write_examples(path, folder / "tokenizer", folder / name)


_VOCABULARY = 384  # at least
