"""A few megabytes of Python's standard library as documents, other ones for each seed."""

from pathlib import Path

from phi_train.data.corpus import decoded, document_paths, shuffle_hash
from phi_train.data.tokenizer import train_tokenizer
from phi_train.studies.texts import write_texts

VOCABULARY = 1024
_LARGEST = 60_000  # characters of a file; one that is longer would be most of a corpus


def code(seed: int, characters: int) -> list[str]:
    """Files in an order drawn by the seed, about so many characters in all."""
    chosen, size = [], 0
    for path, _ in sorted(document_paths("stdlib"), key=lambda pair: shuffle_hash(f"{seed} {pair[1]}")):
        if size >= characters:
            break
        text = decoded(path.read_bytes())
        if text is not None and text.strip() and len(text) <= _LARGEST:
            chosen.append(text)
            size += len(text)
    return chosen


def write_code(seed: int, characters: int, folder: Path, heldout: float = 0.1) -> None:
    """`folder`/tokenizer and `folder`/shards; the last documents are held out, `heldout` of their number."""
    texts = code(seed, characters)
    cut = len(texts) - max(1, round(heldout * len(texts)))
    write_code_tokenizer(texts[:cut], folder)
    write_texts(texts[:cut], texts[cut:], folder / "tokenizer", folder / "shards")


def write_code_tokenizer(texts: list[str], folder: Path) -> None:
    """A tokenizer of VOCABULARY ids, learnt from texts."""
    corpus = folder / "corpus"
    corpus.mkdir()
    for n, text in enumerate(texts):
        (corpus / f"{n}.py").write_text(text, encoding="utf-8")
    train_tokenizer(str(corpus), VOCABULARY, folder / "tokenizer")
