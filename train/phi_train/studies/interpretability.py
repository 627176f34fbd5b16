"""TinyStories (2305.07759, section 5): heads that look at one thing, neurons that answer to one kind of word.

A head that finds the subject is asked where the subject comes next: elsewhere it has nothing to do. The comparisons are
with a model after one step, and with one that had the same words in no order: it has no use for what comes next.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from random import Random

from phi_train.data.shards import open_data
from phi_train.recipes.config import vary
from phi_train.studies.answers import Student
from phi_train.studies.emergence import draw_stories
from phi_train.studies.roles import Head, Inside, Neuron, Role, heads, look, neurons
from phi_train.studies.roles_page import section
from phi_train.studies.study import Arm, Comparison, Control, Scale, Study, small_recipe
from phi_train.studies.texts import words_in, write_texts, write_tokenizer
from phi_train.synthesize.lexicon import ACTIONS, ADJECTIVES, OBJECTS, words
from phi_train.synthesize.world import BOYS, GIRLS, PLACES, Cast

_LENGTH, _BATCH = 160, 20
_ENDS = (".", "?", "!")
_LOOKED: dict[Scale, int] = {"smoke": 20, "demo": 200}  # stories
_BY_DISTANCE: Mapping[str, Role] = {
    "previous word": lambda _, t: (t - 1,),
    "itself": lambda _, t: (t,),
    "beginning": lambda _, t: (0,),
    "end of sentence": lambda said, t: [n for n, word in enumerate(said[:t]) if word in _ENDS],
}
_NAMES = {"hero": "subject", "friend": "friend", "noun": "thing"}  # of words that come more than once, by their field


class Interpretability(Study):
    """See the module."""

    name = "interpretability"
    claim = "Heads of a small model have roles one can name, and its neurons answer to words of one kind each."
    source = "TinyStories, arXiv:2305.07759, section 5"
    stand_in = "the simulator's stories and its lists of words for a reader's eye; a model of 100 K"
    would_show = "more steps, or a model with fewer heads and neurons for as many roles"
    comparisons = (
        Comparison("roles of heads", "stories", "words in no order"),
        Comparison("roles of heads", "stories", "one step"),
        Comparison("neurons of one kind", "stories", "one step"),
        Comparison("neurons of one kind", "stories", "words in no order", of_claim=False),
    )
    controls = (
        Control("roles of heads, words swapped", "stories", most=0.1),
        Control("neurons of one kind, kinds shuffled", "stories", most=0.02),
        Control("log-likelihood", "stories", least=-1.0),
    )

    def arms(self, scale: Scale) -> tuple[Arm, ...]:
        """See `Study`."""
        steps = {"smoke": 6, "demo": 1000}[scale]

        def arm(name: str, shards: str, steps: int) -> Arm:
            r = small_recipe(name, _VOCABULARY, 64, 2, _LENGTH, steps, _BATCH, 3e-3, shards, tinystories=True)
            return Arm(name, vary(r, initializer="fan_in"))

        return (
            arm("stories", "stories", steps),
            arm("words in no order", "no-order", steps),
            arm("one step", "stories", 1),
        )

    def make_data(self, scale: Scale, seed: int, folder: Path) -> None:
        """See `Study`."""
        count = {"smoke": 500, "demo": 16_000}[scale]
        train, heldout = ([text for _, text in draw_stories(s, n)] for s, n in ((seed, count), (seed + 1000, 300)))
        write_tokenizer(words_in(train), folder / "tokenizer")
        draw = Random(f"no order {seed}")  # noqa: S311
        mixed = [" ".join(draw.sample(said, len(said))) for said in (text.split() for text in train)]
        write_texts(train, heldout, folder / "tokenizer", folder / "stories")
        write_texts(mixed, heldout, folder / "tokenizer", folder / "no-order")

    def measure(self, scale: Scale, seed: int, data: Path, checkpoint: Path) -> dict[str, float]:
        """See `Study`."""
        student = Student(checkpoint)
        found, of_heads, of_neurons = _inside(student, seed, _LOOKED[scale])
        swapped = heads(found, _of_words(seed, _LOOKED[scale], {"hero": "noun", "friend": "noun", "noun": "hero"}))
        kinds = list(_kinds().values())
        Random(f"kinds {seed}").shuffle(kinds)  # noqa: S311
        by_chance = neurons(found, dict(zip(_kinds(), kinds, strict=True)))
        return {
            "roles of heads": _largest(of_heads),
            "roles of heads, words swapped": _largest(swapped),
            "neurons of one kind": _share(of_neurons),
            "neurons of one kind, kinds shuffled": _share(by_chance),
            "log-likelihood": student.log_likelihood(open_data(data / "stories").heldout_windows(_LENGTH, 64)),
        }

    def look_inside(self, scale: Scale, seed: int, checkpoint: Path) -> str:
        """See `Study`."""
        if checkpoint.parent.name != "stories":
            return ""
        found, of_heads, of_neurons = _inside(Student(checkpoint), seed, _LOOKED[scale])
        return section(found[0], of_heads, of_neurons)


def _inside(student: Student, seed: int, count: int) -> tuple[list[Inside], list[Head], list[Neuron]]:
    found = [look(student, text) for _, text in _heldout(seed, count)]
    roles: dict[str, list[Role]] = {name: [role] * count for name, role in _BY_DISTANCE.items()}
    roles |= _of_words(seed, count, {field: field for field in _NAMES})
    return found, heads(found, roles), neurons(found, _kinds())


def _heldout(seed: int, count: int) -> list[tuple[Cast, str]]:
    return draw_stories(seed + 1000, count)


def _of_words(seed: int, count: int, looked_for: Mapping[str, str]) -> dict[str, list[Role]]:
    """By the word that comes next, a field of the story's cast: the places of the field that is looked for."""
    casts = [cast for cast, _ in _heldout(seed, count)]
    return {
        _NAMES[field]: [_before(getattr(cast, field), getattr(cast, other)) for cast in casts]
        for field, other in looked_for.items()
    }


def _before(following: str, wanted: str) -> Role:
    """The places of `wanted`, from where `following` is the next word."""
    return lambda said, t: (
        [n for n, word in enumerate(said[: t + 1]) if word == wanted] if said[t + 1 : t + 2] == (following,) else ()
    )


def _largest(found: Sequence[Head]) -> float:
    """The mean over heads of their largest lift."""
    return sum(max(h.lifts.values()) for h in found) / len(found)


def _kinds() -> dict[str, str]:
    """Of words."""
    lists: dict[str, Sequence[str]] = {
        "name": GIRLS + BOYS, "place": PLACES, "thing": words(*OBJECTS), "animal": words("animal"),
        "adjective": words(*ADJECTIVES), "action": words(*ACTIONS), "pronoun": ("he", "she", "He", "She", "his", "her"),
    }  # fmt: skip
    found: dict[str, str] = {}
    for kind, members in lists.items():
        for word in members:
            found.setdefault(word, kind)
    return found


def _share(found: Sequence[Neuron]) -> float:
    return sum(n.kind is not None for n in found) / len(found)


_VOCABULARY = 2048  # at least
