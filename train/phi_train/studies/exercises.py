"""phi-1 (2306.11644, sections 2.2, 3 and 5): textbooks, then a short fine-tune on exercises, which makes a spike.

Textbooks say how 16 operations are written, alone and in rows; exercises, few and another way of asking as phi-1's are,
ask for three of twelve of them in a row. What is asked afterwards is executed in the sandbox: rows of the twelve that
no exercise had, and rows with one of the four that only the textbooks know.
"""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from random import Random

from phi_train.recipes.config import vary
from phi_train.sandbox.run import Job, run_all
from phi_train.studies.answers import Student
from phi_train.studies.study import Arm, Comparison, Control, Scale, Study, small_recipe
from phi_train.studies.texts import words_in, write_texts, write_tokenizer

_OPERATIONS = {
    "double": "x = x * 2", "triple": "x = x * 3", "halve": "x = x // 2", "negate": "x = - x", "square": "x = x * x",
    "increase": "x = x + 1", "decrease": "x = x - 1", "raise": "x = x + 5", "lower": "x = x - 5",
    "advance": "x = x + 3", "remainder": "x = x % 7", "digit": "x = x % 9", "cube": "x = x * x * x",
    "scale": "x = x * 7", "third": "x = x // 3", "shift": "x = x + 8",
}  # fmt: skip
_ONLY_IN_TEXTBOOKS = ("cube", "scale", "third", "shift")
_EXERCISED = tuple(o for o in _OPERATIONS if o not in _ONLY_IN_TEXTBOOKS)
_DISTINCT = 50  # exercises; phi-1's are a fortieth of its tokens
_TRIED = (0, 1, -3, 4, 17, 50)
_LENGTH, _BATCH, _LR = 64, 32, 2e-3
_WAYS = (
    "to {o} a number , write {c} .", "the code {c} will {o} x .", "we {o} x by {c} .", "how do we {o} x ? with {c} .",
    "so {c} is how we {o} .",
)  # fmt: skip


class _Taught(Study):
    """Data and measure of both studies."""

    source = "phi-1, arXiv:2306.11644, sections 2.2 and 3"
    stand_in = "16 operations on x for programming, 50 rows of three for exercises; a model of 100 K"
    controls = (
        Control("gold", "textbooks, exercises", least=1.0),
        Control("no program", "textbooks, exercises", most=0.0),
    )

    def arms(self, scale: Scale) -> tuple[Arm, ...]:
        """See `Study`."""
        first, then = {"smoke": (30, 20), "demo": (1200, 250)}[scale]

        def arm(name: str, shards: str, steps: int, after: str | None = None) -> Arm:
            lr = _LR if after is None else _LR / 10  # as phi-1's
            r = small_recipe(name, _VOCABULARY, 64, 2, _LENGTH, steps, _BATCH, lr, shards)
            return Arm(name, vary(r, initializer="fan_in"), after)

        return (
            arm("textbooks", "textbooks", first),
            arm("textbooks, exercises", "exercises", then, "textbooks"),
            arm("exercises", "exercises", then),
            arm("exercises, equal steps", "exercises", first + then),
        )

    def make_data(self, scale: Scale, seed: int, folder: Path) -> None:
        """See `Study`."""
        draw = Random(f"exercises {seed}")  # noqa: S311
        seen, _ = _rows(seed)
        count = {"smoke": 2000, "demo": 20_000}[scale]
        textbooks = [" ".join(_lesson(draw) for _ in range(4)) for _ in range(count)]
        exercises = [" ".join(_exercise(draw.choice(seen))) for _ in range(count)]
        write_tokenizer(words_in([*textbooks, *exercises]) | {"//"}, folder / "tokenizer")
        for name, texts in (("textbooks", textbooks), ("exercises", exercises)):
            write_texts(texts[:-200], texts[-200:], folder / "tokenizer", folder / name)

    def measure(self, scale: Scale, seed: int, data: Path, checkpoint: Path) -> dict[str, float]:
        """See `Study`."""
        student, count = Student(checkpoint), 20 if scale == "smoke" else 120
        draw = Random(f"asked {seed}")  # noqa: S311
        _, unseen = _rows(seed)
        chosen = draw.sample(unseen, count)
        beyond: list[_Row] = []
        while len(beyond) < count:
            new = list(draw.choice(unseen))
            new[draw.randrange(3)] = draw.choice(_ONLY_IN_TEXTBOOKS)
            if _takes_all(tuple(new)):
                beyond.append(tuple(new))
        longest = 3 * 8
        return {
            "pass@1": _passed(chosen, student.says([_exercise(r)[0] for r in chosen], longest)),
            "pass@1, operations of textbooks alone": _passed(
                beyond, student.says([_exercise(r)[0] for r in beyond], longest)
            ),
            "gold": _passed(chosen + beyond, [_exercise(r)[1] for r in chosen + beyond]),
            "no program": _passed(chosen, [""] * count),
        }


class Exercises(_Taught):
    """See the module."""

    name = "exercises"
    claim = "A short fine-tune on exercises makes a spike, also on tasks that the exercises do not contain."
    would_show = "more exercises, or operations that the textbooks also join"
    comparisons = (
        Comparison("pass@1", "textbooks, exercises", "textbooks"),
        Comparison("pass@1, operations of textbooks alone", "textbooks, exercises", "textbooks"),
    )


class Textbooks(_Taught):
    """See the module."""

    name = "textbooks"
    claim = "Textbooks before the exercises help, at equal steps in all."
    would_show = "a task that the exercises alone do not teach at equal steps"
    comparisons = (
        Comparison("pass@1", "textbooks, exercises", "exercises, equal steps"),
        Comparison("pass@1, operations of textbooks alone", "textbooks, exercises", "exercises, equal steps"),
        Comparison("pass@1", "textbooks, exercises", "exercises", of_claim=False),
    )


_Row = tuple[str, ...]


def _rows(seed: int) -> tuple[list[_Row], list[_Row]]:
    """Rows of three exercised operations: those of the exercises, and all others."""
    rows = [row for row in product(_EXERCISED, repeat=3) if _takes_all(row)]
    Random(f"rows {seed}").shuffle(rows)  # noqa: S311
    return rows[:_DISTINCT], rows[_DISTINCT:]


def _lesson(draw: Random) -> str:
    """How one to three operations are written."""
    row = draw.choices(list(_OPERATIONS), k=draw.randint(1, 3))
    return draw.choice(_WAYS).format(o=" , ".join(row), c=_code(row))


def _code(row: Sequence[str]) -> str:
    return " ; ".join(_OPERATIONS[o] for o in row)


def _exercise(row: _Row) -> tuple[str, str]:
    """What is asked, and the code."""
    return f"task {' , '.join(row)} :", _code(row)


def _passed(rows: list[_Row], said: list[str]) -> float:
    """The share of programs that do what was asked for some numbers."""
    jobs = []
    for row, code in zip(rows, said, strict=True):
        wanted = _values(row)
        tests = f"def check(candidate):\n    assert [candidate(x) for x in {_TRIED}] == {wanted}\n"
        jobs.append(Job(f"def f(x):\n    {code}\n    return x\n", "f", tests))
    return sum(o.kind == "passed" for o in run_all(jobs, workers=1)) / len(jobs)


def _values(row: _Row) -> list[int]:
    """What a row of operations makes of the numbers that are tried."""
    found = []
    for x in _TRIED:
        for o in row:
            x = _apply(o, x)
        found.append(x)
    return found


def _takes_all(row: _Row) -> bool:
    """Whether no part of a row does the same: half a program would pass."""
    parts = [tuple(o for n, o in enumerate(row) if kept >> n & 1) for kept in range(2 ** len(row) - 1)]
    return _values(row) not in map(_values, parts)


def _apply(operation: str, x: int) -> int:
    return {
        "double": x * 2, "triple": x * 3, "halve": x // 2, "negate": -x, "square": x * x, "increase": x + 1,
        "decrease": x - 1, "raise": x + 5, "lower": x - 5, "advance": x + 3, "remainder": x % 7, "digit": x % 9,
        "cube": x**3, "scale": x * 7, "third": x // 3, "shift": x + 8,
    }[operation]  # fmt: skip


_VOCABULARY = 640  # at least
