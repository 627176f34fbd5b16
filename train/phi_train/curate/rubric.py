"""An annotator without a language model: how much a Python file explains and how plainly it is written, 0 to 1.

It stands in for the annotations that phi-1's authors had of GPT-4 ("educational value for a student"); a classifier
that is trained on it agrees with these rules, which is all that its score says.
"""

import ast
import warnings

_LONG, _DEEP = 60, 4  # lines of a function, levels of nesting, that are too many
_ENOUGH_COMMENTS, _ENOUGH_DOCS = 0.12, 0.25  # of all lines


def rubric(text: str) -> float:
    """The mean of five criteria; 0 for what is no Python or defines nothing."""
    try:
        with warnings.catch_warnings(action="ignore"):
            tree = ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return 0.0
    functions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef))]
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not functions or not lines:
        return 0.0
    comments = sum(line.startswith("#") for line in lines) / len(lines)
    documented = [n for n in functions if ast.get_docstring(n, clean=False)]
    words = sum(len((ast.get_docstring(n, clean=False) or "").split()) for n in documented)
    short = sum((n.end_lineno or n.lineno) - n.lineno < _LONG for n in functions) / len(functions)
    flat = sum(_depth(n) <= _DEEP for n in functions) / len(functions)
    criteria = (
        len(documented) / len(functions),
        min(1.0, comments / _ENOUGH_COMMENTS),
        min(1.0, words / (_ENOUGH_DOCS * 10 * len(lines))),
        short * flat,
        min(1.0, sum(map(_is_word, _names(tree))) / max(1, len(_names(tree)))),
    )
    return sum(criteria) / len(criteria)


def _depth(node: ast.AST) -> int:
    nested = (ast.If, ast.For, ast.While, ast.With, ast.Try)
    return max((_depth(c) + isinstance(c, nested) for c in ast.iter_child_nodes(node)), default=0)


def _names(tree: ast.AST) -> list[str]:
    return [n.arg for n in ast.walk(tree) if isinstance(n, ast.arg) and n.arg not in ("self", "cls")]


def _is_word(name: str) -> bool:
    """Rather `count` than `n`, rather `first_row` than `fr`."""
    return len(name) > 3
