"""Textbooks (2306.11644, section 2.2; 2309.05463, section 2.1): diverse by topic, audience and style.

Code that a text shows must run in the sandbox.
"""

import ast
import warnings
from random import Random

from phi_train.sandbox.run import Job
from phi_train.synthesize.kinds import Draft, RejectedError, code_blocks
from phi_train.synthesize.operations import Function, draw_function
from phi_train.synthesize.topics import AUDIENCES, STYLES, Taxonomy
from phi_train.teacher.endpoint import Request

_TOKENS = 1500  # of a reply
_SHORTEST = 400  # characters


class Textbooks:
    """topics: of the texts."""

    name = "textbooks"
    instructs = False

    def __init__(self, topics: Taxonomy, seed: int = 0) -> None:
        self._topics, self._seed = topics, seed

    def request(self, number: int) -> Request:
        """See `Kind`."""
        topic, audience, style = self._wish(number)
        code = ""
        if self._topics.name == "code":
            code = (
                " Explain by prose first; between the paragraphs put short blocks of Python that one can run as they "
                "stand, after the blocks before them, without input or files."
            )
        prompt = (
            f'Write about "{topic[-1]}" (of the field: {", ".join(topic[:-1])}) for {audience}. Write '
            f"{STYLES[style]}. Take the reader from what everybody knows to the reasons behind it.{code} Begin with "
            "a heading, and write nothing about this task."
        )
        return Request(prompt, _TOKENS)

    def simulated(self, number: int) -> str:
        """See `Kind`."""
        draw = self._draw(number)
        while True:  # a lesson on a list of which nothing is kept shows little
            function = draw_function(draw)
            values = function.example(draw)
            if function.trace(values)[0]:
                break
        return _lesson(function, values, draw)

    def draft(self, number: int, reply: str) -> Draft:
        """See `Kind`."""
        topic, audience, style = self._wish(number)
        text = reply.strip()
        if len(text) < _SHORTEST:
            raise RejectedError(f"shorter than {_SHORTEST} characters")
        blocks = code_blocks(text)
        program = "\n".join(blocks)
        if blocks:
            try:
                with warnings.catch_warnings(action="ignore"):
                    ast.parse(program)
            except (SyntaxError, ValueError, RecursionError, MemoryError):
                raise RejectedError("its code is no Python") from None
        fields = {"topic": list(topic), "audience": audience, "style": style, "blocks": len(blocks)}
        job = None
        if blocks:
            job = Job(f"{program}\n\ndef _ran():\n    return True\n", "_ran", "def check(c):\n    assert c()\n")
        return Draft(text, fields, " / ".join(topic) or "simulated", job)

    def _wish(self, number: int) -> tuple[tuple[str, ...], str, str]:
        draw = self._draw(number)
        topic = self._topics.draw(number, self._seed) if self._topics else ()
        style = "textbook" if not self._topics else draw.choice(list(STYLES))
        return topic, draw.choice(AUDIENCES), style

    def _draw(self, number: int) -> Random:
        return Random(f"textbook {self._seed} {number}")  # noqa: S311


def _lesson(function: Function, values: list[object], draw: Random) -> str:
    """A section about one function: what is wanted, how it is reached, the code, what it prints and why."""
    kept, changed = function.trace(values)
    title = function.name.replace("_", " ").capitalize()
    opening = draw.choice(
        (
            f"Suppose that you have a list of {function.of} and want {function.said}.",
            f"A common task is to find {function.said}.",
            f"How would you compute {function.said}? One step at a time.",
        )
    )
    steps = []
    if function.kept:
        steps.append(f"go through the list and keep only the {function.of} that {function.kept.said}")
    if function.changed:
        steps.append(f"take {function.changed.said} of what is left" if kept else f"take {function.changed.said}")
    steps.append(f"return {function.result.said} of these")
    plan = "; then ".join(steps)
    reasons = [f"the first step keeps {kept!r}"] if function.kept else []
    if function.changed:
        reasons.append(f"{function.changed.said} are {changed!r}")
    because = f"Of {values!r}, " + ", ".join([*reasons, f"and the result is `{function(values)!r}`"])
    parameter = function.of
    return (
        f"# {title}\n\n{opening}\n\nThe plan: {plan}.\n\n```python\n{function.signature()}\n"
        f"{function.body(draw)}```\n\nLet us try it:\n\n```python\n{parameter} = {values!r}\n"
        f"print({function.name}({parameter}))\nassert {function.name}({parameter}) == {function(values)!r}\n```\n\n"
        f"This prints `{function(values)}`. {because}. "
        f"An empty list gives `{function([])!r}`, because there is nothing to take.\n"
    )
