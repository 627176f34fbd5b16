"""phi-1.5 (2309.05463, section 2): synthetic text, web text, and both, at equal tokens.

A world of animals with six properties. Synthetic text states three of them as questions with answers; web text tells of
all six in passing, is wrong a quarter of the time, and is mostly about something else. What is asked is all six.
"""

from pathlib import Path
from random import Random

from phi_train.studies.answers import Student
from phi_train.studies.study import Arm, Comparison, Control, Scale, Study, small_recipe
from phi_train.studies.texts import shuffled, words_in, write_texts, write_tokenizer
from phi_train.synthesize.lexicon import words

_PROPERTIES = ("colour", "home", "food", "sound", "size", "age")
_TAUGHT = _PROPERTIES[:3]
_ANIMALS, _VALUES = 40, 12
_WRONG, _ABOUT, _ASKED = 0.25, 0.4, 0.05  # of web text: statements that are wrong, lines on animals, and in questions
_LENGTH, _BATCH = 60, 32
_OTHER = ("the weather in {a} was {b} on day {d} .", "we sold {d} of the {a} for {b} .", "{a} and {b} met on day {d} .")


class WebArms(Study):
    """See the module."""

    name = "web-arms"
    claim = "Web text adds to synthetic text: both together teach more than either, at equal tokens."
    source = "phi-1.5, arXiv:2309.05463, section 2"
    stand_in = "40 animals with six properties for common sense; a model of 100 K"
    would_show = "web text with more that synthetic text lacks, or more steps"
    comparisons = (
        Comparison("all properties", "synthetic and web", "synthetic"),
        Comparison("all properties", "synthetic and web", "web"),
        Comparison("taught properties", "synthetic", "web", of_claim=False),
    )
    controls = (
        Control("taught properties", "synthetic", least=0.9),
        Control("shuffled answers", "synthetic and web", most=0.3),
    )

    def arms(self, scale: Scale) -> tuple[Arm, ...]:
        """See `Study`."""
        steps = {"smoke": 20, "demo": 600}[scale]
        return tuple(
            Arm(name, small_recipe(name, _VOCABULARY, 64, 2, _LENGTH, steps, _BATCH, shards=shards))
            for name, shards in (("synthetic", "synthetic"), ("web", "web"), ("synthetic and web", "both"))
        )

    def make_data(self, scale: Scale, seed: int, folder: Path) -> None:
        """See `Study`."""
        draw, table = Random(f"web-arms {seed}"), _table(seed)  # noqa: S311
        count = {"smoke": 4000, "demo": 120_000}[scale]
        known = sorted(table)
        taught = [key for key in known if key[1] in _TAUGHT]
        synthetic = [" ".join(_question(*key, table[key])) for key in draw.choices(taught, k=count)]
        web = [_web(draw, table, known) for _ in range(count)]
        write_tokenizer(words_in([*synthetic[:5000], *web[:20_000]]) | set(_values()), folder / "tokenizer")
        heldout = [" ".join(_question(*key, table[key])) for key in draw.choices(known, k=400)]
        parts = {"synthetic": [synthetic], "web": [web], "both": [synthetic[::2], web[::2]]}
        for name, chosen in parts.items():
            write_texts(shuffled(chosen, seed), heldout, folder / "tokenizer", folder / name)

    def measure(self, scale: Scale, seed: int, data: Path, checkpoint: Path) -> dict[str, float]:
        """See `Study`."""
        student, table = Student(checkpoint), _table(seed)
        pairs = {key: _question(*key, value) for key, value in sorted(table.items())}
        taught = [pair for key, pair in pairs.items() if key[1] in _TAUGHT]
        whole = list(pairs.values())
        # Each question with the answer of the next animal's same property.
        shifted = [(q, a) for (q, _), (_, a) in zip(whole, whole[len(_PROPERTIES) :], strict=False)]
        return {
            "all properties": student.accuracy(whole),
            "taught properties": student.accuracy(taught),
            "shuffled answers": student.accuracy(shifted),
        }


def _values() -> list[str]:
    return [f"{p}{c}" for p in ("c", "h", "f", "s", "z", "g") for c in "abcdefghijkl"]


def _table(seed: int) -> dict[tuple[str, str], str]:
    draw, values = Random(f"animals {seed}"), _values()  # noqa: S311
    return {
        (animal, name): draw.choice(values[n * _VALUES : (n + 1) * _VALUES])
        for animal in words("animal")[:_ANIMALS]
        for n, name in enumerate(_PROPERTIES)
    }


def _question(animal: str, name: str, value: str) -> tuple[str, str]:
    return f"what is the {name} of the {animal} ?", value


def _web(draw: Random, table: dict[tuple[str, str], str], known: list[tuple[str, str]]) -> str:
    if draw.random() > _ABOUT:
        a, b = draw.sample(_values(), 2)
        return draw.choice(_OTHER).format(a=a, b=b, d=draw.randrange(10))
    key = draw.choice(known)
    value = table[key]
    if draw.random() < _WRONG:
        value = table[draw.choice(known)[0], key[1]]
    if draw.random() < _ASKED / _ABOUT:
        return " ".join(_question(*key, value))
    animal, name = key
    return draw.choice(("i saw the {a} , its {n} is {v} .", "everybody says the {a} has {v} for {n} .")).format(
        a=animal, n=name, v=value
    )


_VOCABULARY = 1024  # at least
