"""What a document passes, one at a time: each step keeps it, changes its text, or says why it goes."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from phi_runtime.errors import UsageError, missing_extra
from phi_train.curate import config
from phi_train.curate.decontaminate import Decontaminator
from phi_train.curate.documents import Document
from phi_train.curate.evaluation_set import read_evaluation_set
from phi_train.curate.syntax import parses


@dataclass(frozen=True)
class Dropped:
    """Why a document goes."""

    why: str


# A text to what stays of it.
Apply = Callable[[str], str | Dropped]


def build(step: config.Step) -> Apply:
    """A fresh one for each shard: some remember what they saw. Raises MissingExtraError, and a set's errors."""
    match step:
        case config.Length():
            return partial(_length, step)
        case config.Parses():
            return lambda text: text if parses(text) else Dropped("no Python")
        case config.Language():
            return _language(step.languages)
        case config.Decontaminate():
            return _decontaminate(step)
        case config.Classifier():
            return _classifier(step)
        case config.DataOptimal():
            return _data_optimal(step)
        case config.MinHash():
            raise AssertionError("not of one document alone")
        case _:
            return _datatrove(step)


def _length(step: config.Length, text: str) -> str | Dropped:
    if len(text) < step.min_chars:
        return Dropped("too short")
    return Dropped("too long") if step.max_chars is not None and len(text) > step.max_chars else text


_LOOKED_AT = 4000  # characters of a text


def _language(wanted: tuple[str, ...]) -> Apply:
    try:
        from py3langid import classify
    except ImportError as e:
        raise missing_extra(e, "data") from None

    def apply(text: str) -> str | Dropped:
        found = str(classify(text[:_LOOKED_AT])[0])
        return text if found in wanted else Dropped(found)

    return apply


def _decontaminate(step: config.Decontaminate) -> Apply:
    against = read_evaluation_set(step.against, step.fields)
    by = Decontaminator(against, config.Settings(step.similarity, step.nodes, step.ngram), threads=1)

    def apply(text: str) -> str | Dropped:
        (matches,) = by.matches([Document("", text, b"")])
        similar = [m for m in matches if by.similar(m)]
        return Dropped(similar[0].problem) if similar else text

    return apply


def _classifier(step: config.Classifier) -> Apply:
    probability = _forests(step.checkpoint, step.model)

    def apply(text: str) -> str | Dropped:
        return text if probability(text)[0] >= step.threshold else Dropped("below the threshold")

    return apply


def _data_optimal(step: config.DataOptimal) -> Apply:
    probability = _forests(step.checkpoint, step.knowledge, step.reasoning)
    most, least = step.thresholds[step.size]

    def apply(text: str) -> str | Dropped:
        knowledge, reasoning = probability(text)
        return Dropped("facts without reasoning") if knowledge >= most and reasoning < least else text

    return apply


def _forests(checkpoint: str, *models: str) -> Callable[[str], list[float]]:
    """What some forests say of a text that is embedded once. Raises UsageError for those of other embeddings."""
    import torch

    from phi_train.curate.classifier import fingerprint
    from phi_train.curate.embed import Embedder
    from phi_train.curate.forest import embedded_length, load_forest

    torch.set_num_threads(1)  # there is a process for each core
    forests = [load_forest(Path(m)) for m in models]
    length = embedded_length(forests[0].embedder)
    embed, wanted = Embedder(Path(checkpoint), length), fingerprint(Path(checkpoint), length)
    for name, forest in zip(models, forests, strict=True):
        if forest.embedder != wanted:
            raise UsageError(
                f"{name}: was trained on other embeddings than those of {length} tokens by {checkpoint}; train it again"
            )

    def probability(text: str) -> list[float]:
        features = embed([text])
        return [float(forest(features)[0]) for forest in forests]

    return probability


def _datatrove(step: config.Step) -> Apply:
    try:
        from datatrove.data import Document as Doc
        from datatrove.pipeline.filters import (
            C4QualityFilter,
            FineWebQualityFilter,
            GopherQualityFilter,
            GopherRepetitionFilter,
        )
        from datatrove.pipeline.formatters import PIIFormatter
    except ImportError as e:
        raise missing_extra(e, "data") from None
    options = {f: getattr(step, f) for f in step.__struct_fields__}
    if isinstance(step, config.Pii):
        formatter = PIIFormatter(**options)
        return lambda text: str(formatter.format(text))
    kinds: dict[type, Any] = {
        config.GopherQuality: GopherQualityFilter,
        config.GopherRepetition: GopherRepetitionFilter,
        config.FineWebQuality: FineWebQualityFilter,
        config.C4Quality: C4QualityFilter,
    }
    block = kinds[type(step)](language=words_tokenizer(), **options)

    def apply(text: str) -> str | Dropped:
        document = Doc(text=text, id="")  # a filter may change the text
        kept = block.filter(document)
        kept, why = kept if isinstance(kept, tuple) else (kept, "dropped")
        return str(document.text) if kept else Dropped(str(why).removeprefix("gopher_"))

    return apply


_WORD = re.compile(r"\w+|[^\w\s]")
_SENTENCE = re.compile(r"[^.!?\n]+[.!?]*")


def words_tokenizer() -> Any:
    """Words by a regular expression: datatrove's English ones want spaCy, which takes thirteen times as long."""
    from datatrove.utils.word_tokenizers import WordTokenizer

    class Words(WordTokenizer):  # type: ignore[misc]
        def word_tokenize(self, text: str) -> list[str]:
            return _WORD.findall(text)

        def sent_tokenize(self, text: str) -> list[str]:
            return [s.strip() for s in _SENTENCE.findall(text) if s.strip()]

        def span_tokenize(self, text: str) -> list[tuple[int, int]]:
            return [m.span() for m in _SENTENCE.finditer(text)]

    return Words()
