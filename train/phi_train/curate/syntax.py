"""How alike functions are by the shape of their syntax trees (phi-1, section 5.2): names, annotations, comments and
docstrings do not count.
"""

import ast
import re
import warnings

import numpy as np
import numpy.typing as npt
from rapidfuzz.distance import Levenshtein
from rapidfuzz.process import cdist

# A character for each type of node, so that a tree is a string.
_LETTERS = {
    kind: chr(0x100 + n)
    for n, (_, kind) in enumerate(
        sorted((k, v) for k, v in vars(ast).items() if isinstance(v, type) and issubclass(v, ast.AST))
    )
}
_FENCED = re.compile(r"^```[a-z]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
_IGNORED = ("ctx", "annotation", "returns", "type_comment")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
# Of each type, the fields that count, the last first.
_FIELDS = {kind: tuple(f for f in reversed(kind._fields) if f not in _IGNORED) for kind in _LETTERS}


def functions(text: str) -> list[str]:
    """The tree of each function in a text as a string, a character a node: of Python, or of Markdown's code blocks."""
    tree = _parsed(text)
    trees = [tree] if tree is not None else [t for t in map(_parsed, _FENCED.findall(text)) if t is not None]
    return [function for tree in trees for function in _functions(tree)]


def _functions(tree: ast.Module) -> list[str]:
    """Each node before those below it, so that a function within another is a part of its string."""
    letters: list[str] = []
    found: list[tuple[int, int]] = []
    waiting: list[ast.AST | int] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, int):  # where a function that is now behind us began
            found.append((node, len(letters)))
            continue
        if isinstance(node, _FUNCTIONS):
            waiting.append(len(letters))
        kind = type(node)
        letters.append(_LETTERS[kind])
        for name in _FIELDS[kind]:
            value = getattr(node, name, None)
            if isinstance(value, ast.AST):
                waiting.append(value)
            elif isinstance(value, list):
                waiting += [v for v in reversed(value) if isinstance(v, ast.AST) and not _is_comment(v)]
    whole = "".join(letters)
    return [whole[start:end] for start, end in sorted(found)]


def parses(text: str) -> bool:
    """Whether it is Python."""
    return _parsed(text) is not None


def _parsed(code: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings(action="ignore"):
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _is_comment(node: ast.AST) -> bool:
    """A docstring, or another string that nobody reads."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def similarities(found: list[str], known: list[str], cutoff: float, threads: int) -> npt.NDArray[np.float64]:
    """1 - edit distance / length of the longer, of each pair [found, known]; 0 below the cutoff."""
    return cdist(
        found, known, scorer=Levenshtein.normalized_similarity, score_cutoff=cutoff, dtype=np.float64, workers=threads
    )
