"""What synthetic documents are about: a taxonomy from which every topic is drawn equally often (2309.05463)."""

import tomllib
from importlib.resources import files
from pathlib import Path
from random import Random

from phi_runtime.contract import nearest
from phi_runtime.errors import NotFoundError, UsageError

AUDIENCES = (
    "children of ten years", "high-school students", "first-year students", "working professionals",
    "people who teach themselves",
)  # fmt: skip
STYLES = {
    "textbook": "a section of a textbook: definitions, reasons, a worked example, common mistakes",
    "story": "a short story in which the characters come to understand it",
    "dialogue": "a dialogue of a teacher and a student who asks good questions",
    "questions": "a short explanation, then six questions that make one think, each with its answer and the reason",
}


class Taxonomy:
    """Paths of a tree: domain, topic, subtopic. False where there are none."""

    def __init__(self, paths: list[tuple[str, ...]], name: str) -> None:
        self.paths, self.name = paths, name
        self._round: tuple[int, int, list[int]] = (-1, -1, [])

    def __len__(self) -> int:
        return len(self.paths)

    def draw(self, number: int, seed: int) -> tuple[str, ...]:
        """The path of a document. Any len(self) documents in a row, from a multiple of it on, have each path once."""
        which, at = divmod(number, len(self.paths))
        if self._round[:2] != (which, seed):
            order = list(range(len(self.paths)))
            Random(f"topics {seed} {which}").shuffle(order)  # noqa: S311
            self._round = (which, seed, order)
        return self.paths[self._round[2][at]]


NO_TOPICS = Taxonomy([], "the simulator's")


def read_topics(name: str) -> Taxonomy:
    """`code`, `general`, or a .toml file. Raises NotFoundError, UsageError naming what is wrong."""
    built_in = tomllib.loads(files("phi_train.synthesize").joinpath("topics.toml").read_text(encoding="utf-8"))
    if name in built_in:
        return Taxonomy(_paths(built_in[name], ()), name)
    path = Path(name)
    if not path.is_file():
        near = "" if path.suffix == ".toml" else nearest(name, built_in)
        raise NotFoundError(f"--topics {name}: no such file{near}; give {', '.join(built_in)}, or a .toml file")
    try:
        tree = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as e:
        raise UsageError(f"--topics {path}: is not TOML ({' '.join(str(e).split())})") from None
    try:
        found = _paths(tree, ())
    except TypeError as e:
        raise UsageError(f"--topics {path}: {e}") from None
    if not found or len(set(found)) < len(found):
        raise UsageError(f"--topics {path}: names no subtopics, or one twice")
    if min(map(len, found)) < 2:
        raise UsageError(f"--topics {path}: a subtopic stands in a topic; put lists below a name")
    return Taxonomy(found, path.name)


def _paths(tree: object, above: tuple[str, ...]) -> list[tuple[str, ...]]:
    if isinstance(tree, dict):
        return [path for name, below in tree.items() for path in _paths(below, (*above, name))]
    if isinstance(tree, list) and all(isinstance(leaf, str) and leaf.strip() for leaf in tree):
        return [(*above, leaf) for leaf in tree]
    raise TypeError(f"{'.'.join(above)}: is no list of texts, nor a table of them")
