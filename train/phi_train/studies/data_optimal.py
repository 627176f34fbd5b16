"""phi-3 (2404.14219, section 2): for a small model, text of facts is better left out in favour of reasoning.

Reasoning is putting six letters in order; facts are results of matches that never come again. A third arm has the
facts and as much reasoning as the first, so at four times the tokens: it says whether the facts take the model's
capacity or only the place of reasoning.
"""

from pathlib import Path
from random import Random
from string import ascii_lowercase

from phi_train.studies.answers import Student
from phi_train.studies.study import Arm, Comparison, Control, Scale, Study, small_recipe
from phi_train.studies.texts import shuffled, write_texts, write_tokenizer

_SYLLABLES = [c + v for c in "bdfgklmnprstvwz" for v in "aeiou"]
_STEPS: dict[Scale, int] = {"smoke": 20, "demo": 800}
VOCABULARY = 512  # at least
LINE, LINES, BATCH = 15, 4, 64  # tokens, lines of a sequence, sequences of a step
_SHARE = 4  # of so many lines one is reasoning, where there are facts


class DataOptimal(Study):
    """See the module."""

    name = "data-optimal"
    claim = "For a small model, dropping facts in favour of reasoning text helps its reasoning."
    source = "phi-3, arXiv:2404.14219, section 2"
    stand_in = "sorting six letters for reasoning, results of matches for facts; models of 25 and 100 K"
    would_show = "a harder task, or smaller models"
    comparisons = (
        Comparison("reasoning", "reasoning", "three quarters facts"),
        Comparison("reasoning", "facts, equal reasoning", "three quarters facts", of_claim=False),
        Comparison("reasoning", "reasoning", "facts, equal reasoning", of_claim=False),
        Comparison("reasoning", "d64, three quarters facts", "three quarters facts", of_claim=False),
    )
    controls = (Control("reasoning", "reasoning", least=0.8), Control("shuffled answers", "reasoning", most=0.05))

    def arms(self, scale: Scale) -> tuple[Arm, ...]:
        """See `Study`."""
        steps = _STEPS[scale]

        def arm(name: str, width: int, shards: str, steps: int) -> Arm:
            r = small_recipe(name, VOCABULARY, width, 2, LINE * LINES, steps, BATCH, shards=shards)
            return Arm(name, r)

        return (
            arm("reasoning", 32, "reasoning", steps),
            arm("three quarters facts", 32, "mixed", steps),
            arm("facts, equal reasoning", 32, "mixed", steps * _SHARE),
            arm("d64, reasoning", 64, "reasoning", steps),
            arm("d64, three quarters facts", 64, "mixed", steps),
        )

    def make_data(self, scale: Scale, seed: int, folder: Path) -> None:
        """See `Study`."""
        write_vocabulary(folder)
        lines = _STEPS[scale] * BATCH * LINES
        draw = Random(f"data-optimal {seed}")  # noqa: S311
        sorts = [" ".join(sort(draw)) for _ in range(lines)]
        facts = [fact(draw) for _ in range(lines * (_SHARE - 1))]
        for name, parts in (("reasoning", [sorts]), ("mixed", [sorts, facts])):
            texts, heldout = shuffled(parts, seed), [" ".join(sort(draw)) for _ in range(300)]
            write_texts(texts, heldout, folder / "tokenizer", folder / name)

    def measure(self, scale: Scale, seed: int, data: Path, checkpoint: Path) -> dict[str, float]:
        """See `Study`."""
        return sorting(scale, seed, checkpoint)


def sorting(scale: Scale, seed: int, checkpoint: Path) -> dict[str, float]:
    """How many letters' orders a model gives, and how many where answers and questions are mixed up."""
    draw = Random(f"asked {seed}")  # noqa: S311
    pairs = [sort(draw) for _ in range(50 if scale == "smoke" else 1000)]
    student = Student(checkpoint)
    others = [(question, answer) for (question, _), (_, answer) in zip(pairs, [*pairs[1:], pairs[0]], strict=True)]
    return {"reasoning": student.accuracy(pairs), "shuffled answers": student.accuracy(others)}


def write_vocabulary(folder: Path) -> None:
    """`folder`/tokenizer, for sorting and matches."""
    words = [*ascii_lowercase, *_SYLLABLES, *"0123456789", ":", "sort", "on", "day", "the", "team", "beat", "to"]
    write_tokenizer(words, folder / "tokenizer")


def sort(draw: Random) -> tuple[str, str]:
    """A question for the order of six letters, and its answer."""
    letters = draw.sample(ascii_lowercase, 6)
    return f"sort {' '.join(letters)} :", " ".join(sorted(letters))


def fact(draw: Random) -> str:
    """The result of a match, as long as a question and its answer."""
    a, b, c, d = (draw.choice(_SYLLABLES) for _ in range(4))
    day = f"{draw.randrange(100):02d}"
    return f"on day {day[0]} {day[1]} the team {a} {b} beat {c} {d} {draw.randrange(1, 10)} to {draw.randrange(10)}"
