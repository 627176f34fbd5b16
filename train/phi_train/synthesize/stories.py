"""TinyStories (2305.07759, sections 2 and 5): stories of basic words about a verb, a noun and an adjective."""

from dataclasses import dataclass
from random import Random

from phi_train.curate.ngrams import words as words_of
from phi_train.synthesize.kinds import Draft, RejectedError
from phi_train.synthesize.lexicon import ACTIONS, ADJECTIVES, NOUNS, OBJECTS, VERBS, forms, words
from phi_train.synthesize.story_judge import sentences
from phi_train.synthesize.world import FEATURES, draw_cast, tell
from phi_train.teacher.endpoint import Request

_TOKENS = 700  # of a reply
_SHORTEST = 200  # characters
HELD_OUT = frozenset({"Words", "Summary"})  # the combination of instructions that training never sees


@dataclass(frozen=True)
class _Wish:
    verb: str
    noun: str
    adjective: str
    features: tuple[str, ...]


class Stories:
    """simulated: draw only words that the simulator can place."""

    name = "tinystories"
    instructs = True

    def __init__(self, seed: int = 0, simulated: bool = False) -> None:
        self._seed = seed
        self._verbs = words(*(ACTIONS if simulated else VERBS + ACTIONS))
        self._nouns = words(*(OBJECTS if simulated else NOUNS))

    def request(self, number: int) -> Request:
        """See `Kind`."""
        wish = self._wish(number)
        said = "".join(f" {FEATURES[f][0].upper()}{FEATURES[f][1:]}." for f in wish.features)
        prompt = (
            "Write a story of three to five short paragraphs for a child of three or four years. Use only words that "
            f'such a child knows. Somewhere in the story use the verb "{wish.verb}", the noun "{wish.noun}" and the '
            f'adjective "{wish.adjective}".{said} Write nothing before the story. After it write a line that begins '
            'with "Summary:" and sums it up in one or two sentences.'
        )
        return Request(prompt, _TOKENS)

    def simulated(self, number: int) -> str:
        """See `Kind`."""
        wish, draw = self._wish(number), Random(f"tell {self._seed} {number}")  # noqa: S311
        story, summary = tell(draw_cast(draw, wish.noun, wish.verb, wish.adjective), wish.features, draw)
        return f"{story}\n\nSummary: {summary}"

    def draft(self, number: int, reply: str) -> Draft:
        """See `Kind`."""
        wish = self._wish(number)
        story, mark, summary = reply.partition("Summary:")
        story = story.strip().strip("*# ").strip()
        if len(story) < _SHORTEST:
            raise RejectedError(f"shorter than {_SHORTEST} characters")
        said = set(words_of(story))
        for name in ("verb", "noun", "adjective"):
            if not forms(getattr(wish, name)) & said:
                raise RejectedError(f"without its {name}")
        fields = {
            "words": [wish.verb, wish.noun, wish.adjective],
            "features": list(wish.features),
            "summary": " ".join(summary.split()) if mark else "",
        }
        return Draft(story, fields, ", ".join(wish.features) or "none")

    def _wish(self, number: int) -> _Wish:
        draw = Random(f"wish {self._seed} {number}")  # noqa: S311
        features = tuple(f for f in FEATURES if draw.random() < 0.5)
        return _Wish(draw.choice(self._verbs), draw.choice(self._nouns), draw.choice(words(*ADJECTIVES)), features)


def instruction(record: dict[str, object], draw: Random) -> tuple[str, bool]:
    """TinyStories-Instruct's text of a story's record, and whether it is of the held-out combination.

    A subset of words, features, a sentence of the story and its summary, in any order, then the story.
    """
    story = str(record["text"])
    said = {
        "Words": ", ".join(map(str, record["words"])),  # type: ignore[call-overload]
        "Features": ", ".join(map(str, record["features"])),  # type: ignore[call-overload]
        "Random sentence": draw.choice(list(sentences(story))),
        "Summary": str(record["summary"]),
    }
    names = [n for n in said if said[n]]
    chosen = draw.sample(names, draw.randint(1, len(names)))
    lines = [f"{name}: {said[name]}" for name in chosen]
    return "\n".join([*lines, "Story:", "", story]), frozenset(chosen) == HELD_OUT
