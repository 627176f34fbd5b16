"""A simulator of stories: events in order, each in one of several wordings, about a hero, a friend, a thing.

It stands in for a language model where none can be asked. `story_judge` reads its sentences back by the same wordings.
A slot in braces is named after a field of `Cast`; those that begin with `a_` bring their article.
"""

from dataclasses import dataclass
from random import Random

from phi_train.synthesize.lexicon import ACTIONS, ADJECTIVES, OBJECTS, words

GIRLS = ("Anna", "Lily", "Mia", "Sue", "Ella", "Rose", "Nora", "Lucy", "Emma", "Zoe", "Ida", "Ruth")
BOYS = ("Tom", "Ben", "Max", "Sam", "Leo", "Tim", "Jack", "Finn", "Paul", "Otto", "Hugo", "Carl")
PLACES = (
    "park", "forest", "beach", "lake", "farm", "market", "garden", "river", "hill", "school", "zoo", "field", "castle",
    "pond", "library", "meadow",
)  # fmt: skip
FEATURES = {
    "dialogue": "the characters speak with each other",
    "bad ending": "the story ends badly",
    "twist": "something happens that nobody expects",
    "foreshadowing": "something that comes later is hinted at before",
    "moral value": "the story teaches a lesson",
    "conflict": "the characters disagree",
}


@dataclass(frozen=True)
class Cast:
    """Who and what a story is about."""

    hero: str
    friend: str
    friend_kind: str
    noun: str
    adjective: str
    verb: str
    place: str

    @property
    def girl(self) -> bool:
        """Whether the hero is one."""
        return self.hero in GIRLS

    def slots(self) -> dict[str, str]:
        """What stands for each slot."""
        he, his = ("she", "her") if self.girl else ("he", "his")
        return {
            "hero": self.hero, "friend": self.friend, "noun": self.noun, "adjective": self.adjective, "verb": self.verb,
            "place": self.place, "he": he, "He": he.title(), "his": his, "kind": "girl" if self.girl else "boy",
            "a_friend_kind": with_article(self.friend_kind), "friend_kind": self.friend_kind,
            "a_noun": with_article(f"{self.adjective} {self.noun}"),
        }  # fmt: skip


@dataclass(frozen=True)
class Event:
    """Something that happens; in stories with the feature `when`, or without `unless`, always where both are empty."""

    name: str
    wordings: tuple[str, ...]
    when: str = ""
    unless: str = ""


EVENTS = (
    Event(
        "intro",
        (
            "Once upon a time there was a {kind} named {hero}.",
            "There was a {kind} called {hero}.",
            "{hero} was a little {kind}.",
            "Long ago there lived a {kind} whose name was {hero}.",
        ),
    ),
    Event(
        "trait",
        (
            "{hero} loved to {verb}.",
            "Every day {he} wanted to {verb}.",
            "{hero} liked to {verb} all day long.",
            "More than anything, {he} liked to {verb}.",
        ),
    ),
    Event(
        "outing",
        (
            "One day {hero} went to the {place}.",
            "One morning {he} walked to the {place}.",
            "On a sunny day {hero} ran to the {place}.",
            "After breakfast {he} set out for the {place}.",
        ),
    ),
    Event(
        "foreshadowing",
        (
            "{He} did not see the dark cloud above the {place}.",
            "Far away there was a sound of thunder.",
            "The wind at the {place} was growing stronger, but {hero} did not mind.",
        ),
        "foreshadowing",
    ),
    Event(
        "find",
        (
            "There {he} saw {a_noun}.",
            "Behind a wall {hero} found {a_noun}.",
            "On the ground lay {a_noun}.",
            "In a corner {he} found {a_noun}.",
        ),
    ),
    Event(
        "want",
        (
            "{hero} wanted to keep the {noun}.",
            "{He} liked the {noun} very much.",
            "The {noun} was so {adjective} that {hero} had to laugh.",
            "{He} held the {noun} with both hands.",
        ),
    ),
    Event(
        "meet",
        (
            "Then {his} friend {friend}, {a_friend_kind}, came along.",
            "{friend} the {friend_kind} came by.",
            "Just then {hero} met {friend}, {a_friend_kind}.",
        ),
    ),
    Event(
        "dialogue",
        (
            '"Look what I have found, {friend}," said {hero}.',
            '"May I hold the {noun}?" asked {friend}.',
            '"What a day!" said {friend} to {hero}.',
        ),
        "dialogue",
    ),
    Event(
        "conflict",
        (
            "{friend} wanted the {noun} too.",
            "{hero} and {friend} both pulled at the {noun}.",
            "{friend} took the {noun} and did not give it back.",
        ),
        "conflict",
    ),
    Event(
        "quarrel",
        (
            "{hero} was angry with {friend}.",
            "They shouted at each other.",
            "For a while {hero} and {friend} did not speak.",
        ),
        "conflict",
    ),
    Event(
        "twist",
        (
            "Then they saw that the {noun} was made of chocolate.",
            "Suddenly the {noun} began to sing.",
            "To their surprise, a tiny door opened in the {noun}.",
        ),
        "twist",
    ),
    Event(
        "storm",
        (
            "Then the storm came, and {hero} and {friend} got wet.",
            "Suddenly heavy rain fell on the {place}.",
            "The storm blew the leaves across the {place}.",
        ),
        "foreshadowing",
    ),
    Event(
        "good",
        (
            "In the end {hero} and {friend} shared the {noun}.",
            "{hero} and {friend} took the {noun} home.",
            "They played with the {noun} until it was dark.",
        ),
        unless="bad ending",
    ),
    Event(
        "happy",
        ("They were happy.", "{hero} smiled at {friend}.", "That night {hero} slept well."),
        unless="bad ending",
    ),
    Event(
        "bad",
        (
            "But the {noun} broke, and nobody could mend it.",
            "{hero} lost the {noun} on the way home.",
            "The {noun} fell into the water and was gone.",
        ),
        "bad ending",
    ),
    Event(
        "sad",
        ("{hero} cried.", "They never found another {noun} like it.", "{He} was sad for a long time."),
        "bad ending",
    ),
    Event(
        "moral",
        (
            "{hero} had learned that friends should share.",
            "From then on {he} always listened to {friend}.",
            "{hero} knew now that a friend is worth more than any {noun}.",
        ),
        "moral value",
    ),
)


def draw_cast(draw: Random, noun: str = "", verb: str = "", adjective: str = "") -> Cast:
    """A cast about given words, or drawn ones."""
    hero, friend = draw.sample(GIRLS + BOYS, 2)
    return Cast(
        hero,
        friend,
        draw.choice(words("animal")),
        noun or draw.choice(words(*OBJECTS)),
        adjective or draw.choice(words(*ADJECTIVES)),
        verb or draw.choice(words(*ACTIONS)),
        draw.choice(PLACES),
    )


def tell(cast: Cast, features: tuple[str, ...], draw: Random) -> tuple[str, str]:
    """A story in three paragraphs, and its summary."""
    slots = cast.slots()
    told = [
        (e.name, draw.choice(e.wordings).format(**slots))
        for e in EVENTS
        if (not e.when or e.when in features) and (not e.unless or e.unless not in features)
    ]
    paragraphs: list[list[str]] = [[]]
    for name, sentence in told:
        if name in ("meet", "good", "bad"):
            paragraphs.append([])
        paragraphs[-1].append(sentence)
    end = "loses it" if "bad ending" in features else f"shares it with {cast.friend} the {cast.friend_kind}"
    summary = f"At the {cast.place} {cast.hero} finds {slots['a_noun']} and {end}."
    return "\n\n".join(" ".join(p) for p in paragraphs), summary


def with_article(phrase: str) -> str:
    """A or an, by sound."""
    vowel = phrase.startswith(("hour", "honest")) or (
        phrase[0] in "aeiou" and not phrase.startswith(("uni", "use", "one", "eu"))
    )
    return f"{'an' if vowel else 'a'} {phrase}"
