"""Take out of a corpus what is like an evaluation set, as phi-1's report does (2306.11644, section 5).

A document is similar to a problem if they share 13 words in a row, or if one of its functions has nearly the tree of
the solution's: 1 - edit distance / length of at least `similarity`, over trees of `nodes` or more, since the shortest
functions are all alike. With an embedding, a similar tree counts only within a distance as well.
"""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from phi_runtime.contract import encode
from phi_runtime.errors import OutputExistsError, UsageError
from phi_runtime.files import staged_folder
from phi_train.curate.config import THRESHOLDS, Settings
from phi_train.curate.documents import Document, Unreadable, read_documents
from phi_train.curate.evaluation_set import EvaluationSet
from phi_train.curate.ngrams import NgramIndex
from phi_train.curate.report import Match, ProblemReport, Report
from phi_train.curate.syntax import functions, similarities

_AT_A_TIME, _BYTES_AT_A_TIME = 512, 8 << 20  # documents
_SHOWN, _SHOWN_UNREADABLE = 200, 10  # of a report

# Told documents read so far.
Progress = Callable[[int], None]
# Texts to vectors of length one, [N, D].
Embed = Callable[[list[str]], npt.NDArray[np.float32]]


class Decontaminator:
    """Finds what is like an evaluation set, and remembers how near each of its problems was come to."""

    def __init__(
        self, against: EvaluationSet, settings: Settings, embed: Embed | None = None, threads: int | None = None
    ) -> None:
        if (settings.distance is None) != (embed is None):
            raise UsageError("an embedding needs a distance, and a distance an embedding; give both or neither")
        self.against, self.settings, self._embed = against, settings, embed
        texts = [i.texts if settings.ngram else () for i in against.items]
        self._ngrams = NgramIndex(texts, settings.ngram or 1)
        trees = [(n, f) for n, i in enumerate(against.items) for f in i.functions if len(f) >= settings.nodes]
        self._owners, self._trees = [n for n, _ in trees], [f for _, f in trees]
        self._vectors: dict[int, npt.NDArray[np.float32]] = {}
        self._highest = [0.0] * len(against.items)
        self._hits = [0] * len(against.items)
        self._threads = threads or os.cpu_count() or 1

    def matches(self, documents: list[Document]) -> list[list[Match]]:
        """Of each document, the best with each problem; of trees, down to the lowest of `THRESHOLDS`."""
        items = self.against.items
        found: list[dict[int, list[Match]]] = []
        for d in documents:
            shared = self._ngrams.find(d.text)
            found.append({n: [Match(d.id, items[n].id, "words", text=t)] for n, t in shared.items()})
        for (n, problem), score in self._similar_trees(documents).items():
            self._highest[problem] = max(self._highest[problem], score)
            distance = self._distance(documents[n], problem)
            match = Match(documents[n].id, items[problem].id, "tree", score, distance)
            found[n].setdefault(problem, []).append(match)
        for by_problem in found:
            for problem, matches in by_problem.items():
                self._hits[problem] += any(map(self.similar, matches))
        return [[m for matches in by_problem.values() for m in matches] for by_problem in found]

    def similar(self, match: Match) -> bool:
        """Whether a match is one by the settings."""
        return match.by == "words" or (match.score >= self.settings.similarity and self.near(match))

    def near(self, match: Match) -> bool:
        """Whether it is within the distance, if there is one."""
        return match.distance is None or match.distance <= (self.settings.distance or 0.0)

    def problems(self) -> tuple[ProblemReport, ...]:
        """How near each was come to."""
        return tuple(
            ProblemReport(i.id, hits > 0, hits, round(highest, 4), n not in self._owners, n in self._ngrams.without)
            for n, (i, hits, highest) in enumerate(zip(self.against.items, self._hits, self._highest, strict=True))
        )

    def _similar_trees(self, documents: list[Document]) -> dict[tuple[int, int], float]:
        """The highest similarity of a document and a problem, by their numbers."""
        least = self.settings.nodes
        trees = [(n, f) for n, d in enumerate(documents) for f in functions(d.text) if len(f) >= least]
        best: dict[tuple[int, int], float] = {}
        if trees and self._trees:
            scores = similarities([f for _, f in trees], self._trees, THRESHOLDS[-1], self._threads)
            for row, column in zip(*np.nonzero(scores), strict=True):
                pair = trees[row][0], self._owners[column]
                best[pair] = max(best.get(pair, 0.0), float(scores[row, column]))
        return best

    def _distance(self, document: Document, problem: int) -> float | None:
        if self._embed is None:
            return None
        if problem not in self._vectors:
            self._vectors[problem] = self._embed(["\n".join(self.against.items[problem].texts)])[0]
        return float(np.linalg.norm(self._embed([document.text])[0] - self._vectors[problem]))


def decontaminate(
    source: Path,
    out: Path,
    decontaminator: Decontaminator,
    text_field: str = "text",
    progress: Progress = lambda _: None,
) -> Report:
    """Write OUT/kept.jsonl, OUT/similar.jsonl and OUT/report.json.

    Raises OutputExistsError, UsageError where nothing can be read, and the errors of `read_documents`.
    """
    if out.exists():
        raise OutputExistsError(f"{out}: exists already; choose another --out")
    counts = _Counts()
    with (
        staged_folder(out) as stage,
        open(stage / "kept.jsonl", "wb") as kept,
        open(stage / "similar.jsonl", "wb") as f,
    ):
        for documents in _batches(read_documents(source, text_field), counts):
            for document, matches in zip(documents, decontaminator.matches(documents), strict=True):
                similar = counts.add(matches, decontaminator)
                (f if similar else kept).write(document.line)
            progress(counts.read)
        if not counts.read:
            said = f", such as {counts.first[0]}" if counts.first else ""
            raise UsageError(f"{source}: none of its records is a document{said}")
        report = counts.report(source, decontaminator)
        (stage / "report.json").write_text(encode(report), encoding="utf-8")
    return report


def _batches(records: Iterator[Document | Unreadable], counts: "_Counts") -> Iterator[list[Document]]:
    documents: list[Document] = []
    size = 0
    for record in records:
        if isinstance(record, Unreadable):
            counts.unreadable[record.why] += 1
            counts.first = [*counts.first, f"{record.id}: {record.why}"][:_SHOWN_UNREADABLE]
            continue
        counts.read += 1
        documents.append(record)
        size += len(record.line)
        if len(documents) >= _AT_A_TIME or size >= _BYTES_AT_A_TIME:
            yield documents
            documents, size = [], 0
    if documents:
        yield documents


class _Counts:
    """What a report counts."""

    def __init__(self) -> None:
        self.read = self.similar = self.by_words = 0
        self.by_tree = dict.fromkeys(map(str, THRESHOLDS), 0)
        self.unreadable: Counter[str] = Counter()
        self.first: list[str] = []
        self.matches: list[Match] = []

    def add(self, matches: list[Match], by: Decontaminator) -> bool:
        """Whether a document is similar."""
        found = [m for m in matches if by.similar(m)]
        self.similar += bool(found)
        self.by_words += any(m.by == "words" for m in found)
        near = max((m.score for m in matches if m.by == "tree" and by.near(m)), default=0.0)
        for threshold in THRESHOLDS:
            self.by_tree[str(threshold)] += near >= threshold
        self.matches += found[: _SHOWN - len(self.matches)]
        return bool(found)

    def report(self, source: Path, by: Decontaminator) -> Report:
        """All of it."""
        settings, problems = by.settings, by.problems()
        return Report(
            source=source.name,
            against=by.against.name,
            against_sha256=by.against.sha256,
            similarity=settings.similarity,
            nodes=settings.nodes,
            ngram=settings.ngram,
            distance=settings.distance,
            read=self.read,
            kept=self.read - self.similar,
            similar=self.similar,
            by_words=self.by_words,
            by_tree=self.by_tree,
            unreadable=dict(self.unreadable),
            unreadable_first=tuple(self.first),
            problems=problems,
            matches=tuple(self.matches),
        )
