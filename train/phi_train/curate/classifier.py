"""phi-1's quality filter (2306.11644, section 2.1): annotate some documents, embed them, train a random forest on that.

The annotations are of the rules in `rubric`, of a teacher (`annotate`), or of a file that people or a model wrote.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from phi_runtime.contract import Contract, encode
from phi_runtime.errors import NotFoundError, OutputExistsError, UsageError, missing_extra
from phi_runtime.files import sha256, write_file
from phi_train.curate.annotate import annotated
from phi_train.curate.documents import Document, read_documents
from phi_train.curate.embed import Embedder
from phi_train.curate.forest import from_sklearn
from phi_train.curate.rubric import rubric
from phi_train.data.corpus import shuffle_hash
from phi_train.teacher.endpoint import Endpoint

_HELD_OUT_OF_100 = 25  # groups
_AT_A_TIME = 64
_QUANTILES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9)

# Told what was done, to how many documents, and all of them.
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Teacher:
    """A model that annotates documents, by one of `annotate.AXES`."""

    endpoint: Endpoint
    axis: str = "educational"


class KeepRate(Contract, frozen=True):
    """The share of documents whose probability is `threshold` or more, and that of good ones among them."""

    threshold: float
    kept: float
    good: float


class ClassifierReport(Contract, frozen=True):
    """How well a forest agrees with the annotations.

    auc, keep_rates: on groups that it was not trained on (a group is what stands before the first / of an id, such
    as a package). unscored: documents that a teacher gave no score, left out. oob: accuracy on the documents that
    each tree did not see; `base` is that of always saying no. sources: the share kept of each group at the
    threshold that keeps as many as are good.
    """

    annotator: str
    axis: str
    documents: int
    unscored: int
    good: int
    groups: int
    heldout_documents: int
    auc: float
    oob: float
    base: float
    trees: int
    keep_rates: tuple[KeepRate, ...]
    sources: dict[str, float]


def train_classifier(
    source: Path,
    checkpoint: Path,
    out: Path,
    annotator: "Path | Teacher | None" = None,
    share: float = 1 / 6,
    least: float | None = None,
    most: int = 3000,
    length: int = 256,
    trees: int = 500,
    field: str = "text",
    seed: int = 0,
    progress: Progress = lambda *_: None,
) -> ClassifierReport:
    """Write OUT (.npz) and OUT with .json, its report.

    annotator: a file of JSON lines of an id and a score, or a teacher; by default the rubric. share: of documents that
    are good, the highest scores; or `least`, the least score of a good one. most: documents, drawn by their names.
    length: tokens of a document that are read. Raises OutputExistsError, MissingExtraError, what a teacher raises, and
    UsageError for too few documents or groups, or equal scores.
    """
    try:
        from sklearn.ensemble import RandomForestClassifier
        from sklearn.metrics import roc_auc_score
    except ImportError as e:
        raise missing_extra(e, "data") from None
    if out.suffix != ".npz":
        raise UsageError(f"{out}: a classifier is a .npz file; choose another --out")
    if out.exists():
        raise OutputExistsError(f"{out}: exists already; choose another --out")
    if not 0 < share < 1:
        raise UsageError(f"share {share} is not between 0 and 1")
    scores = read_annotations(annotator) if isinstance(annotator, Path) else None
    documents = _drawn(source, field, scores, most)
    drawn = len(documents)
    if isinstance(annotator, Teacher):
        said = annotated(documents, annotator.endpoint, annotator.axis, lambda n: progress("annotated", n, drawn))
        scored = [(d, s) for d, s in zip(documents, said, strict=True) if s is not None]
        documents, found = [d for d, _ in scored], np.array([s for _, s in scored])
    else:
        found = np.array([rubric(d.text) if scores is None else scores[d.id] for d in documents])
    good = _highest(found, share) if least is None else found >= least
    groups = np.array([d.id.split("/")[0] if "/" in d.id else d.id for d in documents])
    heldout = np.array([shuffle_hash(f"group {g}") % 100 < _HELD_OUT_OF_100 for g in groups], bool)
    for part, name in ((good[~heldout], "train on"), (good[heldout], "hold out")):
        if not part.any() or part.all():
            raise UsageError(
                f"{source}: {len(documents)} documents of {len(set(groups))} groups leave none that are good, or none "
                f"that are not, to {name}; give more, or another share"
            )
    embed = Embedder(checkpoint, length)
    rows = []
    for start in range(0, len(documents), _AT_A_TIME):
        rows.append(embed([d.text for d in documents[start : start + _AT_A_TIME]]))
        progress("embedded", min(start + _AT_A_TIME, len(documents)), len(documents))
    features = np.concatenate(rows)
    model = RandomForestClassifier(trees, oob_score=True, random_state=seed, n_jobs=-1, class_weight="balanced")
    model.fit(features[~heldout], good[~heldout])
    forest = from_sklearn(model, fingerprint(checkpoint, length), embed.size)
    probability = forest(features[heldout])
    truth = good[heldout]
    cut = float(np.quantile(probability, 1 - truth.mean()))
    report = ClassifierReport(
        annotator=_name(annotator),
        axis=annotator.axis if isinstance(annotator, Teacher) else "",
        documents=len(documents),
        unscored=drawn - len(documents),
        good=int(good.sum()),
        groups=len(set(groups)),
        heldout_documents=int(heldout.sum()),
        auc=float(roc_auc_score(truth, probability)),
        oob=float(model.oob_score_),
        base=float(1 - good[~heldout].mean()),
        trees=trees,
        keep_rates=tuple(_keep_rate(probability, truth, float(np.quantile(probability, q))) for q in _QUANTILES),
        sources={g: float((probability[groups[heldout] == g] >= cut).mean()) for g in sorted(set(groups[heldout]))},
    )
    forest.save(out)
    write_file(out.with_suffix(".json"), encode(report))
    return report


def _name(annotator: Path | Teacher | None) -> str:
    if isinstance(annotator, Teacher):
        return annotator.endpoint.name
    return "rubric" if annotator is None else annotator.name


def fingerprint(checkpoint: Path, length: int) -> str:
    """Of what the features are of: another checkpoint's would be other ones."""
    files = sorted(checkpoint.glob("*.safetensors"))
    return f"{length} " + " ".join(sha256(f)[:16] for f in files)


def read_annotations(path: Path) -> dict[str, float]:
    """By a document's id. Raises NotFoundError, UsageError naming the line."""
    if not path.is_file():
        raise NotFoundError(f"{path}: no such file; give JSON lines with id and score")
    scores: dict[str, float] = {}
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            try:
                row = json.loads(line)
                name, score = row["id"], float(row["score"])
            except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
                raise UsageError(f"{path}: line {number}: is not an id and a score; correct it") from None
            if not isinstance(name, str) or not np.isfinite(score) or name in scores:
                raise UsageError(f"{path}: line {number}: its id is no text or stands twice, or its score is no number")
            scores[name] = score
    return scores


def _highest(scores: np.ndarray, share: float) -> np.ndarray:
    """The highest scores; of many that are equal, all or none."""
    if not len(scores):
        return np.zeros(0, bool)
    cut = np.quantile(scores, 1 - share)
    good: np.ndarray = scores >= cut
    return scores > cut if good.all() else good


def _drawn(source: Path, field: str, scores: dict[str, float] | None, most: int) -> list[Document]:
    """Up to `most`, always the same ones; those that have a score, if there are any. Memory: of these."""
    kept: list[tuple[int, Document]] = []
    for d in read_documents(source, field):
        if isinstance(d, Document) and d.text.strip() and (scores is None or d.id in scores):
            kept.append((shuffle_hash(f"annotate {d.id}"), d))
            if len(kept) >= 2 * most:
                kept = sorted(kept, key=lambda pair: pair[0])[:most]
    return [d for _, d in sorted(kept, key=lambda pair: pair[0])[:most]]


def _keep_rate(said: np.ndarray, truth: np.ndarray, threshold: float) -> KeepRate:
    kept = said >= threshold
    return KeepRate(threshold, float(kept.mean()), float(truth[kept].mean()) if kept.any() else 0.0)
