"""The file of `phi-train data run`: where documents come from, the steps that they pass, what is made of them."""

import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from phi_runtime.contract import StrictContract, convert, nearest
from phi_runtime.errors import NotFoundError, UsageError

_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]
_Count = Annotated[int, msgspec.Meta(ge=1)]


class Length(StrictContract, frozen=True, tag_field="name", tag="length"):
    """Characters of a text."""

    min_chars: Annotated[int, msgspec.Meta(ge=0)] = 1
    max_chars: Annotated[int, msgspec.Meta(ge=1)] | None = None

    def __post_init__(self) -> None:
        if self.max_chars is not None and self.max_chars < self.min_chars:
            raise ValueError("max_chars is below min_chars: nothing would be kept")


class Parses(StrictContract, frozen=True, tag_field="name", tag="parses"):
    """Only what Python can parse."""


class Language(StrictContract, frozen=True, tag_field="name", tag="language"):
    """By py3langid, of the first thousands of characters; codes of ISO 639-1."""

    languages: tuple[Annotated[str, msgspec.Meta(pattern="^[a-z]{2}$")], ...] = ("en",)

    def __post_init__(self) -> None:
        if not self.languages:
            raise ValueError("languages: names none")


class GopherQuality(StrictContract, frozen=True, tag_field="name", tag="gopher-quality"):
    """datatrove's, of 2112.11446: words, symbols, bullets, stop words."""

    min_doc_words: int = 50
    max_doc_words: int = 100_000
    min_avg_word_length: float = 3
    max_avg_word_length: float = 10
    max_symbol_word_ratio: _Share = 0.1
    max_bullet_lines_ratio: _Share = 0.9
    max_ellipsis_lines_ratio: _Share = 0.3
    max_non_alpha_words_ratio: _Share = 0.8
    min_stop_words: int = 2


class GopherRepetition(StrictContract, frozen=True, tag_field="name", tag="gopher-repetition"):
    """datatrove's, of 2112.11446: repeated lines, paragraphs and n-grams."""

    dup_line_frac: _Share = 0.3
    dup_para_frac: _Share = 0.3
    dup_line_char_frac: _Share = 0.2
    dup_para_char_frac: _Share = 0.2


class FineWebQuality(StrictContract, frozen=True, tag_field="name", tag="fineweb-quality"):
    """datatrove's, of 2406.17557: punctuation at line ends, short lines, repeated characters."""

    line_punct_thr: _Share = 0.12
    short_line_thr: _Share = 0.67
    char_duplicates_ratio: _Share = 0.01


class C4Quality(StrictContract, frozen=True, tag_field="name", tag="c4-quality"):
    """datatrove's, of 1910.10683: takes out lines without an end, and pages of too few."""

    min_num_sentences: int = 5
    min_words_per_line: int = 3
    filter_curly_bracket: bool = True


class Pii(StrictContract, frozen=True, tag_field="name", tag="pii"):
    """datatrove's: replaces e-mail and public IP addresses."""

    remove_emails: bool = True
    remove_ips: bool = True


class MinHash(StrictContract, frozen=True, tag_field="name", tag="minhash"):
    """Of documents that share most of their n-grams of words, the first.

    Two documents of Jaccard similarity s are found with probability 1 - (1 - s**hashes)**buckets: 0.5 at 0.72 and 0.92
    at 0.8, by the defaults, which are FineWeb's.
    """

    ngram: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 5
    buckets: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 14
    hashes: Annotated[int, msgspec.Meta(ge=1, le=1000)] = 8
    seed: Annotated[int, msgspec.Meta(ge=0, le=1 << 62)] = 1


THRESHOLDS = (0.95, 0.90, 0.85, 0.80)  # of trees, that phi-1 prunes at


@dataclass(frozen=True)
class Settings:
    """When a document is similar. ngram: words in a row; 0 to leave them out. distance: of embeddings, 0 to 2."""

    similarity: float = 0.9
    nodes: int = 20
    ngram: int = 13
    distance: float | None = None

    def __post_init__(self) -> None:
        if not THRESHOLDS[-1] <= self.similarity <= 1:
            raise UsageError(f"similarity {self.similarity} is not between {THRESHOLDS[-1]} and 1")
        if self.nodes < 1 or self.ngram < 0:
            raise UsageError("nodes is 1 or more, ngram 0 or more")
        if self.distance is not None and not 0 <= self.distance <= 2:
            raise UsageError(f"distance {self.distance} is not between 0 and 2")


class Decontaminate(StrictContract, frozen=True, tag_field="name", tag="decontaminate"):
    """As `phi-train data decontaminate`, without embeddings."""

    against: str
    fields: tuple[str, ...] = ()
    similarity: float = Settings.similarity
    nodes: int = Settings.nodes
    ngram: int = Settings.ngram


class Classifier(StrictContract, frozen=True, tag_field="name", tag="classifier"):
    """By a forest of `phi-train data classifier`; checkpoint: that whose embeddings it was trained on."""

    model: str
    checkpoint: str
    threshold: _Share


class DataOptimal(StrictContract, frozen=True, tag_field="name", tag="data-optimal"):
    """phi-3's choice of data for a model's size: what is mostly facts and teaches little reasoning goes.

    knowledge, reasoning: forests of `phi-train data classifier --axis`. thresholds: by size, of both; a document is
    dropped whose knowledge load is at or above the first and whose reasoning value is below the second.
    """

    knowledge: str
    reasoning: str
    checkpoint: str
    size: str
    thresholds: dict[str, tuple[_Share, _Share]]

    def __post_init__(self) -> None:
        if self.size not in self.thresholds:
            known = ", ".join(self.thresholds) or "none"
            raise ValueError(f"thresholds: has none for size {self.size!r}, only {known}")


Step = (
    Length
    | Parses
    | Language
    | GopherQuality
    | GopherRepetition
    | FineWebQuality
    | C4Quality
    | Pii
    | MinHash
    | Decontaminate
    | Classifier
    | DataOptimal
)
STEPS: dict[str, type] = {str(kind.__struct_config__.tag): kind for kind in Step.__args__}


class DataConfig(StrictContract, frozen=True, kw_only=True):
    """A pipeline.

    input: files and folders, as `read_documents` takes them. field: of a JSON line, the text. shard_bytes: of input,
    for a shard, which is done or not done after a kill. tokenizer: folder of one, to write the trainer's shards as
    well. documents: whether to keep the texts beside the tokens.
    """

    input: tuple[str, ...]
    field: str = "text"
    shard_bytes: Annotated[int, msgspec.Meta(ge=1000)] = 16_000_000
    step: tuple[Step, ...] = ()
    tokenizer: str | None = None
    documents: bool = True

    def __post_init__(self) -> None:
        if not self.input or not all(self.input):
            raise ValueError("input: names nothing")
        if not self.documents and self.tokenizer is None:
            raise ValueError("documents: nothing would be written without them and without a tokenizer")


def read_config(path: Path) -> DataConfig:
    """Read a .toml file. Raises NotFoundError, UsageError in one line that names the field, or the nearest step."""
    try:
        raw = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFoundError(f"{path}: no such file; give a pipeline as TOML") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UsageError(f"{path}: is not TOML ({' '.join(str(e).split())})") from None
    steps = raw.get("step")
    for n, step in enumerate(steps if isinstance(steps, list) else []):
        name = step.get("name") if isinstance(step, dict) else None
        if isinstance(name, str) and name not in STEPS:
            raise UsageError(
                f"{path}: step[{n}]: no step {name!r}{nearest(name, STEPS)}; choose from {', '.join(STEPS)}"
            )
    try:
        return convert(raw, DataConfig)
    except ValueError as e:
        raise UsageError(f"{path}: {e}") from None
