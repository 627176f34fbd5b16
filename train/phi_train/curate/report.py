"""What a decontamination found: `report.json`."""

from typing import Literal

from phi_runtime.contract import Contract


class Match(Contract, frozen=True):
    """A document and a problem that are alike; score: similarity of trees. text: the words that they share."""

    document: str
    problem: str
    by: Literal["words", "tree"]
    score: float = 0.0
    distance: float | None = None
    text: str = ""


class ProblemReport(Contract, frozen=True):
    """How near a corpus comes to a problem.

    similar: by the settings, so that scores can be split by it. highest: similarity of trees, 0 below 0.8. no_tree,
    no_words: it has none that is long enough, so that nothing can match it that way.
    """

    id: str
    similar: bool
    documents: int
    highest: float
    no_tree: bool
    no_words: bool


class Report(Contract, frozen=True):
    """What was read, what was kept, and why not the rest.

    by_tree: documents with a tree of at least so much similarity, whatever `similarity` is. matches: the first of
    them.
    """

    source: str
    against: str
    against_sha256: str
    similarity: float
    nodes: int
    ngram: int
    distance: float | None
    read: int
    kept: int
    similar: int
    by_words: int
    by_tree: dict[str, int]
    unreadable: dict[str, int]
    unreadable_first: tuple[str, ...]
    problems: tuple[ProblemReport, ...]
    matches: tuple[Match, ...]
