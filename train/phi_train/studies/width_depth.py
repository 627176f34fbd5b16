"""TinyStories (2305.07759, section 4.3 and figure 10): width carries facts, depth carries context.

Half of the texts are facts ("ba do : red"), a subject of two words and its colour, the same ones again and again; the
other half name six pairs and then ask for them in another order, different ones each time.
"""

from pathlib import Path
from random import Random

from phi_train.recipes.config import vary
from phi_train.studies.answers import Student
from phi_train.studies.study import Arm, Comparison, Control, Scale, Study, small_recipe
from phi_train.studies.texts import shuffled, write_texts, write_tokenizer

_SYLLABLES = [c + v for c in "bdfgklmnprstvwz" for v in "aeiou"][:64]
_KEYS = [f"k{c}" for c in "abcdefghijklmnop"]
_VALUES = [f"v{c}" for c in "abcdefghijklmnopqrstuvwxyzABCDEF"]
_COLOURS = [f"c{c}" for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"] + [f"d{c}" for c in "abcdefghijkl"]
_PAIRS, _FACTS_A_TEXT = 6, 8
_LENGTH = 25  # 24 words and the text's end


class WidthDepth(Study):
    """See the module."""

    name = "width-depth"
    claim = "Width carries facts, depth carries context: a second layer finds what the text itself has said."
    source = "TinyStories, arXiv:2305.07759, section 4.3"
    stand_in = (
        "pairs in the text for instructions, 4,096 subjects of two syllables for knowledge; models of 10 to 270 K"
    )
    would_show = "more steps, until the wide and deep arm looks back with each seed"
    comparisons = (
        Comparison("retrieval", "d64-L2", "d64-L1"),
        Comparison("retrieval", "d64-L2", "d128-L1"),
        Comparison("facts", "d64-L2", "d16-L2"),
        Comparison("facts", "d64-L1", "d16-L2"),
        Comparison("retrieval", "d128-L1", "d64-L1", of_claim=False),
    )
    controls = (Control("retrieval", "d64-L2", least=0.9), Control("facts", "d64-L2", least=0.9))

    def arms(self, scale: Scale) -> tuple[Arm, ...]:
        """See `Study`."""
        steps = {"smoke": 40, "demo": 4000}[scale]
        return tuple(
            Arm(
                name,
                vary(small_recipe(name, _VOCABULARY, width, layers, _LENGTH, steps, lr=3e-3), initializer="fan_in"),
            )
            for name, width, layers in (("d16-L2", 16, 2), ("d64-L1", 64, 1), ("d64-L2", 64, 2), ("d128-L1", 128, 1))
        )

    def make_data(self, scale: Scale, seed: int, folder: Path) -> None:
        """See `Study`."""
        write_tokenizer([*_SYLLABLES, *_KEYS, *_VALUES, *_COLOURS], folder / "tokenizer")
        draw, table = Random(f"width-depth {seed}"), _table(seed)  # noqa: S311
        count = {"smoke": 2000, "demo": 60_000}[scale]
        facts = [" ".join(f"{s} {table[s]}" for s in draw.sample(sorted(table), _FACTS_A_TEXT)) for _ in range(count)]
        pairs = [" ".join(_pairs(draw)[0]) for _ in range(count)]
        texts = shuffled([facts, pairs], seed)
        write_texts(texts[:-200], texts[-200:], folder / "tokenizer", folder / "shards")

    def measure(self, scale: Scale, seed: int, data: Path, checkpoint: Path) -> dict[str, float]:
        """See `Study`."""
        student, table, draw = Student(checkpoint), _table(seed), Random(f"asked {seed}")  # noqa: S311
        count = {"smoke": 100, "demo": 1000}[scale]
        asked = []
        for _ in range(count):
            words, answers = _pairs(draw)
            n = draw.randrange(_PAIRS)
            asked.append((" ".join(words[: 2 * _PAIRS + 2 * n + 1]), answers[n]))
        # The text before the question is facts too, as it was learnt.
        subjects = sorted(table)
        known = []
        for subject in draw.sample(subjects, count):
            before = " ".join(f"{s} {table[s]}" for s in draw.sample(subjects, 2))
            known.append((f"{before} {subject}", table[subject]))
        return {"retrieval": student.accuracy(asked), "facts": student.accuracy(known)}


def _table(seed: int) -> dict[str, str]:
    draw = Random(f"facts {seed}")  # noqa: S311
    return {f"{a} {b}": draw.choice(_COLOURS) for a in _SYLLABLES for b in _SYLLABLES}


def _pairs(draw: Random) -> tuple[list[str], list[str]]:
    """The words of a text, and the answers of its second half."""
    keys, values = draw.sample(_KEYS, _PAIRS), [draw.choice(_VALUES) for _ in range(_PAIRS)]
    order = draw.sample(range(_PAIRS), _PAIRS)
    words = [word for n in range(_PAIRS) for word in (keys[n], values[n])]
    return words + [word for n in order for word in (keys[n], values[n])], [values[n] for n in order]


_VOCABULARY = 512  # at least; the tokenizer's own is smaller
