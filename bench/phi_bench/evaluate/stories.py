"""How well a model completes stories, and how much of that it has memorised: `phi-bench stories`.

By TinyStories' protocol, 2305.07759, sections 4 and 4.3: completions at temperature 1, a judge's scores, ROUGE-2.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations
from pathlib import Path
from statistics import mean
from typing import Protocol

from phi_bench.evaluate.code_tasks import mean_and_error
from phi_bench.evaluate.models import Scorer, open_scorer
from phi_bench.measure.models import describe
from phi_runtime.contract import Contract, encode
from phi_runtime.errors import BenchmarkError, OutputExistsError
from phi_runtime.files import write_file
from phi_runtime.version import __version__
from phi_train.curate.documents import Document, read_documents
from phi_train.curate.ngrams import words
from phi_train.data.corpus import shuffle_hash
from phi_train.synthesize.overlap import Nearest, f_score, grams, precision
from phi_train.synthesize.story_judge import Scores
from phi_train.teacher.cache import RequestCache

_SHARE = 0.4  # of a story, that a model is given
_PAIRWISE = 100  # completions, of which each two are compared
_GRAMS = range(1, 9)
AXES = ("grammar", "consistency", "creativity")

# Told completions written, and all of them.
Progress = Callable[[int, int], None]


class Judge(Protocol):
    """Scores completions."""

    name: str

    def judged(self, pairs: Iterable[tuple[str, str]]) -> Iterator[Scores | None]:
        """Of beginnings and completions, in order; None where no scores came."""


class Score(Contract, frozen=True):
    """0 to 10, the mean over beginnings and its standard error. gold: the same of the stories' true endings."""

    axis: str
    mean: float
    error: float
    gold: float | None


class Memorised(Contract, frozen=True):
    """How much completions are those of the training stories.

    true_ending: ROUGE-2 precision against the rest of the story that was cut, and that of beginnings in the training
    set (`trained_ending`), where a model that memorises does better. nearest: of the training story that is nearest.
    pairwise: the mean over 100 completions of the largest ROUGE-2 F with another. new: the share of completions'
    n-grams, n of 1 to 8, that no training story has. gold_nearest, gold_new: the same of true endings.
    """

    true_ending: float
    trained_ending: float | None
    nearest: float | None
    gold_nearest: float | None
    pairwise: float
    new: tuple[float, ...]
    gold_new: tuple[float, ...]


class Completion(Contract, frozen=True):
    """What a model wrote. scores: by axis, and `age`; none where the judge gave none."""

    story: str
    text: str
    scores: dict[str, float]
    age: str


class StoryResult(Contract, frozen=True):
    """A whole evaluation. unjudged: completions without scores, left out of the means."""

    model: str
    model_sha256: str
    judge: str
    stories: str
    beginnings: int
    samples: int
    temperature: float
    max_tokens: int
    seed: int
    version: str
    scores: tuple[Score, ...]
    ages: dict[str, int]
    unjudged: int
    memorised: Memorised
    completions: tuple[Completion, ...]


class Asked(Contract, frozen=True):
    """stories: JSON lines or a folder, that the model was not trained on. train: those that it was."""

    model: Path
    stories: Path
    train: Path | None = None
    beginnings: int = 50
    samples: int = 10
    temperature: float = 1.0
    max_tokens: int = 200
    seed: int = 0
    threads: int | None = None


def evaluate(
    asked: Asked,
    judge_of: Callable[[Nearest | None], Judge],
    out: Path,
    force: bool = False,
    progress: Progress = lambda *_: None,
) -> StoryResult:
    """Write OUT; completions are kept in OUT.completions until then, from where the same call goes on.

    judge_of: makes the judge, given the training stories, if there are any.

    Raises OutputExistsError, BenchmarkError for too few stories, and the errors of the model and the judge.
    """
    if out.exists() and not force:
        raise OutputExistsError(f"{out}: exists already; name another file, or replace it with --force")
    pairs = _drawn(asked.stories, asked.beginnings)
    train = list(texts(asked.train)) if asked.train else []
    near = Nearest(train) if train else None
    judge = judge_of(near)
    trained = [_cut(text) for text in train[: asked.beginnings]]
    described = describe(asked.model, asked.model.name)
    said = json.dumps([described.sha256, asked.temperature, asked.max_tokens, __version__])
    kept = out.with_name(out.name + ".completions")
    scorer = open_scorer(asked.model, asked.threads)
    try:
        with RequestCache(kept, said, force) as cache:
            jobs = [(b, n) for b, _ in pairs for n in range(asked.samples)] + [(b, 0) for b, _ in trained]
            written = []
            for done, (beginning, n) in enumerate(jobs, 1):
                written.append(_written(scorer, cache, beginning, asked, asked.seed * 1000 + n))
                progress(done, len(jobs))
    finally:
        scorer.close()
    again = written[len(pairs) * asked.samples :]
    written = written[: len(pairs) * asked.samples]
    given = [pair for pair in pairs for _ in range(asked.samples)]
    scores = list(judge.judged((b, w) for (b, _), w in zip(given, written, strict=True)))
    gold = [s for s in judge.judged(pairs) if s is not None]
    result = StoryResult(
        model=asked.model.name,
        model_sha256=described.sha256,
        judge=judge.name,
        stories=asked.stories.name,
        beginnings=len(pairs),
        samples=asked.samples,
        temperature=asked.temperature,
        max_tokens=asked.max_tokens,
        seed=asked.seed,
        version=__version__,
        scores=tuple(_score(axis, scores, asked.samples, gold) for axis in AXES),
        ages=_ages(scores),
        unjudged=sum(s is None for s in scores),
        memorised=_memorised(given, written, pairs, train, near, list(zip(trained, again, strict=True))),
        completions=tuple(_completion(b, w, s) for (b, _), w, s in zip(given, written, scores, strict=True)),
    )
    write_file(out, encode(result))
    kept.unlink()
    return result


def texts(path: Path) -> Iterator[str]:
    """Stories of more than 20 words."""
    return (d.text for d in read_documents(path) if isinstance(d, Document) and len(words(d.text)) > 20)


def _drawn(path: Path, count: int) -> list[tuple[str, str]]:
    """Beginnings and true endings of stories, always the same ones."""
    found = sorted(texts(path), key=lambda text: (shuffle_hash(text), text))[:count]
    if len(found) < 2:
        raise BenchmarkError(f"{path}: holds fewer than two stories; give more")
    return [_cut(text) for text in found]


def _cut(text: str) -> tuple[str, str]:
    """Between two words, in the middle of a sentence as like as not."""
    at = text.find(" ", int(_SHARE * len(text)))
    return (text[:at], text[at:]) if at > 0 else (text, "")


def _written(scorer: Scorer, cache: RequestCache, beginning: str, asked: Asked, seed: int) -> str:
    kept = cache.get(beginning, seed)
    if kept is None:
        prompt = scorer.tokenize(beginning)
        most = min(asked.max_tokens, scorer.context - len(prompt))
        if most < 1:
            raise BenchmarkError(f"a beginning has {len(prompt)} tokens, the context holds {scorer.context}")
        kept = scorer.generate(prompt, most, (), asked.temperature, seed)
        cache.put(kept, beginning, seed)
    return str(kept)


def _score(axis: str, scores: list[Scores | None], samples: int, gold: list[Scores]) -> Score:
    by_beginning = [scores[n : n + samples] for n in range(0, len(scores), samples)]
    means = [mean(found) for part in by_beginning if (found := [getattr(s, axis) for s in part if s is not None])]
    if not means:
        return Score(axis, 0.0, 0.0, None)
    return Score(axis, *mean_and_error(means), mean(getattr(s, axis) for s in gold) if gold else None)


def _ages(scores: list[Scores | None]) -> dict[str, int]:
    found: dict[str, int] = {}
    for age in sorted(s.age for s in scores if s is not None):
        found[age] = found.get(age, 0) + 1
    return found


def _completion(beginning: str, text: str, scores: Scores | None) -> Completion:
    given = {} if scores is None else {axis: round(getattr(scores, axis), 3) for axis in AXES}
    return Completion(beginning, text, given, "" if scores is None else scores.age)


def _memorised(
    given: list[tuple[str, str]],
    written: list[str],
    pairs: list[tuple[str, str]],
    train: list[str],
    near: Nearest | None,
    trained: list[tuple[tuple[str, str], str]],
) -> Memorised:
    known = _Grams(train) if train else None
    first = written[:_PAIRWISE]
    largest = [0.0] * len(first)
    for one, other in combinations(range(len(first)), 2):
        common = f_score(first[one], first[other])
        largest[one], largest[other] = max(largest[one], common), max(largest[other], common)
    endings = [ending for _, ending in pairs]
    return Memorised(
        true_ending=mean(precision(w, ending) for w, (_, ending) in zip(written, given, strict=True)),
        trained_ending=mean(precision(w, ending) for (_, ending), w in trained) if trained else None,
        nearest=mean(map(near.precision, written)) if near else None,
        gold_nearest=mean(map(near.precision, endings)) if near else None,
        pairwise=mean(largest),
        new=known.new(written) if known else (),
        gold_new=known.new(endings) if known else (),
    )


class _Grams:
    """The n-grams of words of some texts, by their hashes."""

    def __init__(self, texts: list[str]) -> None:
        self._known: dict[int, set[int]] = {n: set() for n in _GRAMS}
        for text in texts:
            for n, gram in _grams(text):
                self._known[n].add(gram)

    def new(self, texts: list[str]) -> tuple[float, ...]:
        """For each n, the share of the texts' n-grams that none of those has."""
        total, new = dict.fromkeys(_GRAMS, 0), dict.fromkeys(_GRAMS, 0)
        for text in texts:
            for n, gram in _grams(text):
                total[n] += 1
                new[n] += gram not in self._known[n]
        return tuple(new[n] / total[n] if total[n] else 0.0 for n in _GRAMS)


def _grams(text: str) -> Iterator[tuple[int, int]]:
    found = words(text)
    return ((n, gram) for n in _GRAMS for gram in grams(found, n))
