"""TinyStories (2305.07759, section 4.1 and figure 9): grammar comes before consistency as models grow.

Stories of the simulator with few words each, told on from their first four sentences by models of 6 K to 400 K block
parameters; its judge reads them back. The judge's own creativity (what is not copied) says nothing of a model that
babbles, so it is given and no claim rests on it.
"""

from pathlib import Path
from random import Random

from phi_train.studies.answers import Student
from phi_train.studies.study import Arm, Comparison, Control, Scale, Study, small_recipe
from phi_train.studies.texts import words_in, write_texts, write_tokenizer
from phi_train.synthesize.lexicon import ACTIONS, ADJECTIVES, OBJECTS, words
from phi_train.synthesize.overlap import Nearest
from phi_train.synthesize.story_judge import SimulatorJudge, sentences
from phi_train.synthesize.world import Cast, draw_cast, tell

_CHOICES = 20  # nouns, verbs and adjectives; so small a world can be learnt by so small models
_LENGTH, _BATCH = 160, 20
_SAID, _NEW = 4, 90  # sentences that are given; tokens that are written
_GIVEN = 200  # stories


class Emergence(Study):
    """See the module."""

    name = "emergence"
    claim = "Grammar is there before consistency: small models write right sentences that contradict the story."
    source = "TinyStories, arXiv:2305.07759, section 4.1"
    stand_in = "the simulator's stories with 20 nouns, verbs and adjectives, and its judge, for GPT-3.5's and GPT-4"
    would_show = "sizes between these, or more steps of the largest; creativity takes a language model as judge"
    comparisons = (
        Comparison("grammar lead", "d32-L2", "d128-L2"),
        Comparison("grammar", "d32-L2", "d16-L2"),
        Comparison("consistency", "d128-L2", "d32-L2"),
        Comparison("consistency", "d64-L2", "d64-L1", of_claim=False),
        Comparison("consistency", "d128-L1", "d64-L1", of_claim=False),
    )
    controls = (
        Control("gold grammar", "d128-L2", least=0.97),
        Control("gold consistency", "d128-L2", least=0.97),
        Control("swapped consistency", "d128-L2", most=0.8),
        Control("grammar", "d128-L2", least=0.9),
    )

    def arms(self, scale: Scale) -> tuple[Arm, ...]:
        """See `Study`."""
        steps = {"smoke": 6, "demo": 1500}[scale]
        sizes = ((16, 2), (32, 2), (64, 1), (64, 2), (128, 1), (128, 2))
        return tuple(
            Arm(f"d{w}-L{n}", small_recipe(f"d{w}-L{n}", _VOCABULARY, w, n, _LENGTH, steps, _BATCH, tinystories=True))
            for w, n in sizes
        )

    def make_data(self, scale: Scale, seed: int, folder: Path) -> None:
        """See `Study`."""
        count = {"smoke": 500, "demo": 16_000}[scale]
        train, heldout = _stories(seed, count), _stories(seed + 1000, 300)
        write_tokenizer(words_in(train), folder / "tokenizer")
        write_texts(train, heldout, folder / "tokenizer", folder / "shards")

    def measure(self, scale: Scale, seed: int, data: Path, checkpoint: Path) -> dict[str, float]:
        """See `Study`."""
        given = 20 if scale == "smoke" else _GIVEN
        stories = [list(sentences(s)) for s in _stories(seed + 1000, 300)[:given]]
        begun = [" ".join(s[:_SAID]) for s in stories]
        gold = [" ".join(s[_SAID:]) for s in stories]
        judge = SimulatorJudge(Nearest(_stories(seed, 2000)))
        written = _scores(judge, begun, Student(checkpoint).draws(begun, _NEW))
        right, swapped = _scores(judge, begun, gold), _scores(judge, begun, [*gold[1:], gold[0]])
        return {
            "grammar": written["grammar"],
            "consistency": written["consistency"],
            "grammar lead": written["grammar"] - written["consistency"],
            "creativity": written["creativity"],
            "gold grammar": right["grammar"],
            "gold consistency": right["consistency"],
            "swapped consistency": swapped["consistency"],  # of other stories' ends
        }


def _scores(judge: SimulatorJudge, begun: list[str], added: list[str]) -> dict[str, float]:
    """Means, 0 to 1."""
    found = [judge(b + " ", a) for b, a in zip(begun, added, strict=True)]
    return {n: sum(getattr(f, n) for f in found) / len(found) / 10 for n in ("grammar", "consistency", "creativity")}


def _stories(seed: int, count: int) -> list[str]:
    return [text for _, text in draw_stories(seed, count)]


def draw_stories(seed: int, count: int) -> list[tuple[Cast, str]]:
    """Stories of few words, and who they are about."""
    draw = Random(f"emergence {seed}")  # noqa: S311
    nouns, verbs, adjectives = (words(*kinds)[:_CHOICES] for kinds in (OBJECTS, ACTIONS, ADJECTIVES))
    casts = (draw_cast(draw, draw.choice(nouns), draw.choice(verbs), draw.choice(adjectives)) for _ in range(count))
    return [(cast, " ".join(tell(cast, (), draw)[0].split())) for cast in casts]


_VOCABULARY = 2048  # at least
