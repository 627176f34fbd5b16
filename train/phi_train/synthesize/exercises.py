"""CodeExercises (phi-1, 2306.11644, section 2.3): a docstring to complete, its solution, and tests that can fail.

Diversity comes from the function's name, which the teacher is given. An exercise is kept if its solution passes its
tests in the sandbox and a function that returns nothing does not.
"""

import ast
import warnings
from random import Random

from phi_train.sandbox.run import Job
from phi_train.synthesize.kinds import Draft, RejectedError, code_blocks
from phi_train.synthesize.lexicon import words
from phi_train.synthesize.operations import draw_function
from phi_train.synthesize.topics import Taxonomy
from phi_train.teacher.endpoint import Request

_TOKENS = 900  # of a reply


class Exercises:
    """topics: whose leaves the exercises are about, beside their names."""

    name = "exercises"
    instructs = False

    def __init__(self, topics: Taxonomy, seed: int = 0) -> None:
        self._topics, self._seed = topics, seed

    def request(self, number: int) -> Request:
        """See `Kind`."""
        name, topic = self._wish(number)
        prompt = (
            f"Write a Python exercise about {topic[-1]} ({topic[-2]}): a function called `{name}`. Answer with one "
            "block of Python code and nothing else. It begins with the imports that are needed, if any. Then comes the "
            f"function `{name}` with type hints, a docstring that says exactly what it returns and has two examples in "
            "the form of doctest, and a correct, plain solution. Then comes a function `check(candidate)` that calls "
            "`candidate` in place of the function, with at least four assert statements, edge cases among them. Read "
            "no files and print nothing."
        )
        return Request(prompt, _TOKENS)

    def simulated(self, number: int) -> str:
        """See `Kind`."""
        draw = self._draw(number)
        function = draw_function(draw)
        examples = [function.example(draw) for _ in range(2)]
        shown = "".join(f"    >>> {function.name}({e!r})\n    {function(e)!r}\n" for e in examples)
        docstring = f'    """Return {function.said}.\n\n{shown}    """\n'
        tests = [*(function.example(draw) for _ in range(4)), []]
        asserts = "".join(f"    assert candidate({e!r}) == {function(e)!r}\n" for e in tests)
        code = f"{function.signature()}\n{docstring}{function.body(draw)}\n\ndef check(candidate):\n{asserts}"
        return f"```python\n{code}```"

    def draft(self, number: int, reply: str) -> Draft:
        """See `Kind`."""
        name, topic = self._wish(number)
        blocks = code_blocks(reply) or [reply]
        code = max(blocks, key=len)
        try:
            with warnings.catch_warnings(action="ignore"):
                tree = ast.parse(code)
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            raise RejectedError("is no Python") from None
        if not name:  # the simulator chooses its own
            name = next((n.name for n in tree.body if isinstance(n, ast.FunctionDef)), "")
        function = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == name), None)
        check = next((n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "check"), None)
        if function is None:
            raise RejectedError("without its function")
        docstring = ast.get_docstring(function)
        if not docstring or len(function.body) < 2:
            raise RejectedError("without a docstring or a solution")
        if check is None or sum(isinstance(n, ast.Assert) for n in ast.walk(check)) < 2:
            raise RejectedError("without tests")
        before = [n for n in tree.body if n is not check and n.lineno < check.lineno]
        program = _source(code, [n for n in before if isinstance(n, _PARTS)])
        imports = _source(code, [n for n in before if isinstance(n, (ast.Import, ast.ImportFrom))])
        tests = imports + ast.unparse(check) + "\n"
        stub = f"def {name}(*_, **__):\n    return None\n"
        fields = {"entry_point": name, "test": tests, "topic": list(topic)}
        return Draft(program, fields, " / ".join(topic) or name, Job(program, name, tests), Job(stub, name, tests))

    def _wish(self, number: int) -> tuple[str, tuple[str, ...]]:
        if not self._topics:
            return "", ()
        draw = self._draw(number)
        name = f"{draw.choice(words('code verb'))}_{draw.choice(words('code thing'))}"
        if draw.random() < 0.5:
            name += f"_{draw.choice(words('code qualifier'))}"
        return name, self._topics.draw(number, self._seed)

    def _draw(self, number: int) -> Random:
        return Random(f"exercise {self._seed} {number}")  # noqa: S311


_PARTS = (ast.FunctionDef, ast.Import, ast.ImportFrom, ast.ClassDef, ast.Assign)


def _source(code: str, nodes: list[ast.stmt]) -> str:
    """The text of some statements, comments inside them included."""
    lines = code.splitlines()
    parts = []
    for node in nodes:
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
        parts.append("\n".join(lines[first - 1 : node.end_lineno]))
    text = ""
    for node, part in zip(nodes, parts, strict=True):
        gap = "" if not text else "\n" if isinstance(node, (ast.Import, ast.ImportFrom)) else "\n\n\n"
        text += gap + part
    return text + "\n"
