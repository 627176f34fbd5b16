"""phi-1 (2306.11644, section 3): filtered code against unfiltered, at equal steps and at fewer.

The filter is the rubric of `data classifier` (docstrings, comments, names, short functions), which keeps a third; what
is learnt is measured on held-out files that the filter would keep, and on all kinds.
"""

from pathlib import Path

from phi_train.curate.rubric import rubric
from phi_train.data.shards import open_data
from phi_train.studies.answers import Student
from phi_train.studies.code_texts import VOCABULARY, code, write_code_tokenizer
from phi_train.studies.study import Arm, Comparison, Control, Scale, Study, small_recipe
from phi_train.studies.texts import write_texts

_LENGTH, _BATCH = 128, 16
_KEPT = 1 / 3
_FEWER = 36 / 96  # of the steps, as phi-1's


class Filter(Study):
    """See the module."""

    name = "filter"
    claim = "Filtered code teaches more than unfiltered, at equal steps and at 36 / 96 of them."
    source = "phi-1, arXiv:2306.11644, section 3"
    stand_in = (
        "the standard library for The Stack, a rubric for GPT-4's annotations, likelihood of explained code for "
        "HumanEval; 0.9 M parameters"
    )
    would_show = "a corpus with more that teaches nothing, and a measure by problems that are solved"
    comparisons = (
        Comparison("explained code", "filtered", "unfiltered"),
        Comparison("explained code", "filtered, fewer steps", "unfiltered"),
        Comparison("any code", "filtered", "unfiltered", of_claim=False),
    )
    controls = (Control("explained code", "unfiltered", least=-6.0),)

    def arms(self, scale: Scale) -> tuple[Arm, ...]:
        """See `Study`."""
        steps = {"smoke": 20, "demo": 480}[scale]

        def arm(name: str, shards: str, steps: int) -> Arm:
            return Arm(name, small_recipe(name, VOCABULARY, 128, 4, _LENGTH, steps, _BATCH, shards=shards))

        return (
            arm("unfiltered", "unfiltered", steps),
            arm("filtered", "filtered", steps),
            arm("filtered, fewer steps", "filtered", round(steps * _FEWER)),
        )

    def make_data(self, scale: Scale, seed: int, folder: Path) -> None:
        """See `Study`."""
        texts = code(seed, {"smoke": 800_000, "demo": 9_000_000}[scale])
        cut = len(texts) * 4 // 5
        train, heldout = texts[:cut], texts[cut:]
        write_code_tokenizer(train, folder)
        scores = [rubric(text) for text in train]
        least = sorted(scores, reverse=True)[round(len(scores) * _KEPT)]
        kept = [text for text, score in zip(train, scores, strict=True) if score > least]
        explained = [text for text in heldout if rubric(text) > least]
        tokenizer = folder / "tokenizer"
        write_texts(train, heldout, tokenizer, folder / "unfiltered")
        write_texts(kept, explained, tokenizer, folder / "filtered")

    def measure(self, scale: Scale, seed: int, data: Path, checkpoint: Path) -> dict[str, float]:
        """See `Study`."""
        student, most = Student(checkpoint), 16 if scale == "smoke" else 600
        return {
            name: student.log_likelihood(open_data(data / shards).heldout_windows(_LENGTH, most))
            for name, shards in (("explained code", "filtered"), ("any code", "unfiltered"))
        }
