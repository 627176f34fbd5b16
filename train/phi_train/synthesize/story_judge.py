"""A judge of the simulator's stories, after TinyStories' (2305.07759, section 4): grammar, consistency, creativity.

It knows the simulator's wordings and nothing else: to judge other stories, ask a language model (`endpoint_judge`). Its
age group is a bucket of the other scores, a stand-in for a language model's guess.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache

from phi_train.synthesize.lexicon import ACTIONS, ADJECTIVES, OBJECTS, words
from phi_train.synthesize.overlap import Nearest
from phi_train.synthesize.world import BOYS, EVENTS, GIRLS, PLACES, with_article

AGE_GROUPS = ("A: 3 or under", "B: 4-5", "C: 6-7", "D: 8-9", "E: 10-12", "F: 13-16")
_LEAST = (0.0, 3.0, 5.0, 6.5, 8.0, 9.5)  # mean score from which on an age group is that of the stories


@dataclass(frozen=True)
class Scores:
    """0 to 10 each; `age` is one of AGE_GROUPS."""

    grammar: float
    consistency: float
    creativity: float
    age: str


class SimulatorJudge:
    """training: stories that a completion may have been copied from."""

    name = "simulator"

    def __init__(self, training: Nearest | None = None) -> None:
        self._training = training

    def __call__(self, beginning: str, completion: str) -> Scores:
        """Scores of what a completion adds, in the light of the beginning."""
        state = _State()
        known, cut = _cut(beginning)
        for sentence in known:
            state.fits(sentence)
        added = list(sentences(cut + completion))
        if len(added) > 1 and not _ENDED.search(added[-1]):
            added = added[:-1]  # cut by the number of tokens
        found = [state.fits(s) for s in added]
        read = [fits for fits in found if fits is not None]
        grammar = 10 * len(read) / len(found) if found else 0.0
        consistency = 10 * sum(read) / len(read) if read else 0.0
        copied = 0.0 if self._training is None else self._training.precision(completion)
        creativity = 10 * (1 - copied) if completion.strip() else 0.0
        return Scores(grammar, consistency, creativity, age_of((grammar + consistency) / 2))

    def judged(self, pairs: Iterable[tuple[str, str]]) -> Iterator[Scores | None]:
        """Of beginnings and completions, in order."""
        return (self(*pair) for pair in pairs)


def age_of(score: float) -> str:
    """The age group of a mean score."""
    return AGE_GROUPS[max(n for n, least in enumerate(_LEAST) if score >= least)]


def sentences(text: str) -> Iterator[str]:
    """Its sentences; speech and what says who speaks are one."""
    for found in re.split(r'(?<=[.!?])\s+(?=[A-Z"])|(?<=[.!?]")\s+(?=[A-Z"])', " ".join(text.split())):
        if found:
            yield found


_ENDED = re.compile(r'[.!?]"?$')


def _cut(beginning: str) -> tuple[list[str], str]:
    """Whole sentences, and the beginning of one that was cut."""
    found = list(sentences(beginning))
    if found and not _ENDED.search(found[-1]):
        space = " " if beginning[-1:].isspace() else ""
        return found[:-1], found[-1] + space
    return found, ""


class _State:
    """What was said so far."""

    def __init__(self) -> None:
        self._known: dict[str, str] = {}
        self._at = -1

    def fits(self, sentence: str) -> bool | None:
        """Whether it contradicts nothing said before; None where it is no sentence of the simulator's language."""
        readings = list(_readings(sentence))
        if not readings:
            return None
        fitting = [r for r in readings if r[0] > self._at and self._agrees(r[1])]
        at, said = fitting[0] if fitting else readings[0]
        for slot, value in said.items():
            self._known.setdefault(slot, value)
        self._at = max(self._at, at)
        return bool(fitting)

    def _agrees(self, said: dict[str, str]) -> bool:
        known = self._known
        for slot, value in said.items():
            if slot in known:
                if known[slot] != value:
                    return False
            elif slot in ("hero", "friend") and value in known.values():
                return False  # another's name
        return "he" not in said or "he" in known or "hero" in said


def _readings(sentence: str) -> Iterator[tuple[int, dict[str, str]]]:
    """The events that a sentence may tell, with what it says of each slot."""
    for at, pattern in _patterns():
        found = pattern.fullmatch(sentence)
        if found is None:
            continue
        said = {slot: value for slot, value in found.groupdict().items() if value is not None}
        if _grammatical(said):
            yield at, _settled(said)


def _grammatical(said: dict[str, str]) -> bool:
    return all(
        with_article(phrase) == f"{said[f'{slot}_article']} {phrase}"
        for slot in ("a_noun", "a_friend_kind")
        if (phrase := said.get(slot)) is not None
    )


def _settled(said: dict[str, str]) -> dict[str, str]:
    """What it says of the cast: pronouns and kinds are of the hero's sex, a phrase is an adjective and a noun."""
    out: dict[str, str] = {
        slot: said[slot] for slot in ("hero", "friend", "friend_kind", "noun", "verb", "place") if slot in said
    }
    if "a_friend_kind" in said:
        out["friend_kind"] = said["a_friend_kind"]
    if "a_noun" in said:
        out["adjective"], out["noun"] = said["a_noun"].split(" ")
    if "adjective" in said:
        out["adjective"] = said["adjective"]
    girl = {"she": "girl", "he": "boy", "She": "girl", "He": "boy", "her": "girl", "his": "boy"}
    for slot in ("he", "He", "his"):
        if slot in said:
            out["he"] = girl[said[slot]]
    if "kind" in said:
        out["he"] = said["kind"]
    if "hero" in said:
        sex = "girl" if said["hero"] in GIRLS else "boy"
        out["he"] = sex if out.get("he", sex) == sex else "both"
    return out


@cache
def _patterns() -> list[tuple[int, re.Pattern[str]]]:
    """Of every wording, with the place of its event in a story."""
    names, nouns = _any(GIRLS + BOYS), _any(words(*OBJECTS))
    adjectives, animals = _any(words(*ADJECTIVES)), _any(words("animal"))
    values = {
        "hero": names, "friend": names, "noun": nouns, "adjective": adjectives, "verb": _any(words(*ACTIONS)),
        "place": _any(PLACES), "he": "he|she", "He": "He|She", "his": "his|her", "kind": "girl|boy",
        "friend_kind": animals,
    }  # fmt: skip
    found = []
    for at, event in enumerate(EVENTS):
        for wording in event.wordings:
            pattern, seen = "", set()
            for part in re.split(r"(\{\w+\})", wording):
                if not part.startswith("{"):
                    pattern += re.escape(part)
                    continue
                slot = part.strip("{}")
                if slot in seen:
                    pattern += f"(?P={slot})"
                elif slot == "a_noun":
                    pattern += f"(?P<a_noun_article>an?) (?P<a_noun>(?:{adjectives}) (?:{nouns}))"
                elif slot == "a_friend_kind":
                    pattern += f"(?P<a_friend_kind_article>an?) (?P<a_friend_kind>{animals})"
                else:
                    pattern += f"(?P<{slot}>{values[slot]})"
                seen.add(slot)
            found.append((at, re.compile(pattern)))
    return found


def _any(options: tuple[str, ...]) -> str:
    return "|".join(map(re.escape, options))
