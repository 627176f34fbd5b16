"""A simulator of exercises: small functions over lists, composed of what to keep, how to change it and what to return.

Each part has its words, its code, and the same as a function, so that examples are computed and not guessed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from phi_train.synthesize.lexicon import OBJECTS, words

LETTERS = "abcdefghilmnoprst"


@dataclass(frozen=True)
class Part:
    """name: in a function's. said: in its docstring. code: of x, or of `values`. run: the same."""

    name: str
    said: str
    code: str
    run: Callable[[Any], Any]
    returns: str = ""  # the type
    tail: str = ""  # what its docstring ends in


@dataclass(frozen=True)
class Function:
    """A composition. kept: which elements; changed: each of them; result: of them all."""

    of: str  # numbers or words
    kept: Part | None
    changed: Part | None
    result: Part

    @property
    def name(self) -> str:
        """As one would call it."""
        parts = [self.result.name, *([self.changed.name] if self.changed else [])]
        noun = f"{self.of}_{self.kept.name}" if self.kept else self.of
        return "_of_".join([*parts, noun])

    @property
    def said(self) -> str:
        """What it returns, in words."""
        what = f"the {self.of}" + (f" that {self.kept.said}" if self.kept else "")
        if self.changed:
            what = f"{self.changed.said} of {what}"
        return f"{self.result.said} of {what}{self.result.tail}"

    def __call__(self, values: list[Any]) -> Any:
        """What it returns for a list."""
        found = [x for x in values if self.kept is None or self.kept.run(x)]
        return self.result.run([self.changed.run(x) for x in found] if self.changed else found)

    def trace(self, values: list[Any]) -> tuple[list[Any], list[Any]]:
        """What is kept, and what that becomes."""
        found = [x for x in values if self.kept is None or self.kept.run(x)]
        return found, [self.changed.run(x) for x in found] if self.changed else found

    def body(self, draw: Random) -> str:
        """Its lines, in one of three styles."""
        element = self.changed.code if self.changed else "x"
        condition = f" if {self.kept.code}" if self.kept else ""
        style = draw.randrange(3)
        if style == 0:
            inner = f"[{element} for x in {self.of}{condition}]" if self.kept or self.changed else f"list({self.of})"
            return f"    values = {inner}\n    return {self.result.code}\n"
        lines = ["    values = []", f"    for x in {self.of}:"]
        if style == 1 or not self.kept:
            if self.kept:
                lines.append(f"        if {self.kept.code}:")
            lines.append(f"{'            ' if self.kept else '        '}values.append({element})")
        else:
            lines += [
                f"        if not ({self.kept.code}):",
                "            continue",
                f"        values.append({element})",
            ]
        return "\n".join([*lines, f"    return {self.result.code}"]) + "\n"

    def signature(self) -> str:
        """Its first line."""
        item = "int" if self.of == "numbers" else "str"
        inner = "int" if self.of == "numbers" or (self.changed and self.changed.name == "lengths") else "str"
        return f"def {self.name}({self.of}: list[{item}]) -> {self.result.returns.replace('T', inner)}:"

    def example(self, draw: Random) -> list[Any]:
        """An argument."""
        size = draw.randint(3, 7)
        if self.of == "numbers":
            return [draw.randint(-12, 25) for _ in range(size)]
        return draw.sample(words(*OBJECTS), size)


def draw_function(draw: Random) -> Function:
    """A composition; some thousands are possible."""
    of = draw.choice(("numbers", "words"))
    kept = draw.choice((_kept_number, _kept_word)[of == "words"](draw)) if draw.random() < 0.8 else None
    changed = draw.choice((_changed_number, _changed_word)[of == "words"](draw)) if draw.random() < 0.7 else None
    of_numbers = of == "numbers" or (changed is not None and changed.name == "lengths")
    result = draw.choice(_RESULTS + (_OF_NUMBERS if of_numbers else _of_words(draw)))
    return Function(of, kept, changed, result)


def _kept_number(draw: Random) -> tuple[Part, ...]:
    k, m = draw.randint(-5, 15), draw.randint(3, 9)
    low = f"minus_{-k}" if k < 0 else str(k)
    return (
        Part("that_are_even", "are even", "x % 2 == 0", lambda x: x % 2 == 0),
        Part("that_are_odd", "are odd", "x % 2 == 1", lambda x: x % 2 == 1),
        Part("that_are_positive", "are positive", "x > 0", lambda x: x > 0),
        Part("that_are_negative", "are negative", "x < 0", lambda x: x < 0),
        Part(f"above_{low}", f"are greater than {k}", f"x > {k}", lambda x: x > k),
        Part(f"below_{low}", f"are less than {k}", f"x < {k}", lambda x: x < k),
        Part(f"divisible_by_{m}", f"are divisible by {m}", f"x % {m} == 0", lambda x: x % m == 0),
        Part(f"other_than_{low}", f"are not {k}", f"x != {k}", lambda x: x != k),
        Part(f"ending_in_{m}", f"end in the digit {m}", f"abs(x) % 10 == {m}", lambda x: abs(x) % 10 == m),
    )


def _kept_word(draw: Random) -> tuple[Part, ...]:
    k, c = draw.randint(3, 6), draw.choice(LETTERS)
    return (
        Part(f"longer_than_{k}", f"have more than {k} letters", f"len(x) > {k}", lambda x: len(x) > k),
        Part(f"of_length_{k}", f"have exactly {k} letters", f"len(x) == {k}", lambda x: len(x) == k),
        Part(f"with_{c}", f"contain the letter {c}", f"{c!r} in x", lambda x: c in x),
        Part(f"without_{c}", f"do not contain the letter {c}", f"{c!r} not in x", lambda x: c not in x),
        Part(f"before_{c}", f"come before {c!r} in the alphabet", f"x < {c!r}", lambda x: x < c),
        Part(f"ending_in_{c}", f"end in {c}", f"x.endswith({c!r})", lambda x: x.endswith(c)),
    )


def _changed_number(draw: Random) -> tuple[Part, ...]:
    k = draw.randint(2, 12)
    return (
        Part("squares", "the squares", "x * x", lambda x: x * x),
        Part("doubles", "the doubles", "2 * x", lambda x: 2 * x),
        Part("cubes", "the cubes", "x ** 3", lambda x: x**3),
        Part("sizes", "the absolute values", "abs(x)", abs),
        Part("opposites", "the opposites", "-x", lambda x: -x),
        Part(f"remainders_by_{k}", f"the remainders by {k}", f"x % {k}", lambda x: x % k),
        Part(f"quotients_by_{k}", f"the whole quotients by {k}", f"x // {k}", lambda x: x // k),
        Part(f"distances_to_{k}", f"the distances to {k}", f"abs(x - {k})", lambda x: abs(x - k)),
    )


def _changed_word(draw: Random) -> tuple[Part, ...]:
    c = draw.choice(LETTERS)
    return (
        Part("lengths", "the lengths", "len(x)", len),
        Part("capitals", "the upper-case forms", "x.upper()", str.upper),
        Part("first_letters", "the first letters", "x[0]", lambda x: x[0]),
        Part("last_letters", "the last letters", "x[-1]", lambda x: x[-1]),
        Part("mirrors", "the reversals", "x[::-1]", lambda x: x[::-1]),
        Part(f"remains_without_{c}", f"what is left without {c}", f"x.replace({c!r}, '')", lambda x: x.replace(c, "")),
    )


def _of_words(draw: Random) -> tuple[Part, ...]:
    sep, name = draw.choice(((" ", "spaces"), (", ", "commas"), ("-", "dashes"), ("", "nothing")))
    return (
        Part("longest", "the longest", "max(values, key=len, default='')",
             lambda v: max(v, key=len, default=""), "str", ", or '' if there are none"),
        Part(f"join_by_{name}", "one text", f"{sep!r}.join(values)", sep.join, "str",
             f", joined by {sep!r}"),
    )  # fmt: skip


_RESULTS = (
    Part("count", "the number", "len(values)", len, "int"),
    Part("list", "a list", "values", list, "list[T]"),
    Part("sorted", "a sorted list", "sorted(values)", sorted, "list[T]"),
    Part("reversed", "a reversed list", "values[::-1]", lambda v: v[::-1], "list[T]"),
    Part("distinct", "the number of different ones", "len(set(values))", lambda v: len(set(v)), "int"),
    Part("last_three", "the last three", "values[-3:]", lambda v: v[-3:], "list[T]"),
)
_NONE = ", or 0 if there are none"
_OF_NUMBERS = (
    Part("sum", "the sum", "sum(values)", sum, "int"),
    Part("largest", "the largest", "max(values, default=0)", lambda v: max(v, default=0), "int", _NONE),
    Part("smallest", "the smallest", "min(values, default=0)", lambda v: min(v, default=0), "int", _NONE),
    Part("range", "the difference between the largest and the smallest",
         "max(values) - min(values) if values else 0", lambda v: max(v) - min(v) if v else 0, "int", _NONE),
    Part("rounded_mean", "the mean", "sum(values) // len(values) if values else 0",
         lambda v: sum(v) // len(v) if v else 0, "int", f", rounded down{_NONE}"),
)  # fmt: skip
