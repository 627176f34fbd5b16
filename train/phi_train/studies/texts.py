"""Texts of a small world of words: their tokenizer, in which each word is one token, and their shards."""

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from phi_runtime.files import staged_folder
from phi_runtime.text.tokenizer import Tokenizer
from phi_train.data.encoding import open_encoder
from phi_train.data.shards import INDEX, index_text
from phi_train.data.tokenizer import build_tokenizer, tokenizer_config

_SPACE = "\u2581"


def write_tokenizer(words: Iterable[str], out: Path) -> int:
    """A tokenizer with a token for each word (letters, digits or signs) and its beginnings; the size of its vocabulary.

    A word has its token after a space or at a text's beginning.
    """
    whole = sorted(set(words))
    letters = sorted({c for word in whole for c in word} | {_SPACE, "\n"})
    parts = {_SPACE + word[:n] for word in whole for n in range(1, len(word) + 1)}
    tokenizer = build_tokenizer([*letters, *sorted(parts, key=lambda p: (len(p), p))])
    with staged_folder(out) as stage:
        (stage / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
        (stage / "tokenizer_config.json").write_text(json.dumps(tokenizer_config(tokenizer), indent=1) + "\n")
    return tokenizer.get_vocab_size(with_added_tokens=True)


def words_in(texts: Iterable[str]) -> set[str]:
    """The words of texts as `write_tokenizer` wants them."""
    return {word for text in texts for word in re.findall(r"[^\W\d_]+|\d|[^\w\s]|_", text)}


def write_texts(train: Sequence[str], heldout: Sequence[str], tokenizer: Path, out: Path) -> int:
    """Shards of texts in their order, each ended as documents are; the training tokens."""
    encoder, end = open_encoder(tokenizer)
    with staged_folder(out) as stage:
        for name, texts in (("train-00000.bin", train), ("heldout.bin", heldout)):
            (stage / name).write_bytes(b"".join(encoder.encode(text) + end for text in texts))
        (stage / "heldout.txt").write_text("\n".join(heldout), encoding="utf-8")
        text = index_text(stage, ["train-00000.bin"], encoder, tokenizer)
        (stage / INDEX).write_text(text)
        return int(json.loads(text)["train_tokens"])


def token_count(tokenizer: Path, text: str) -> int:
    """With the token that ends a document."""
    return len(Tokenizer(tokenizer).encode(text)) + 1


def shuffled(parts: Sequence[Sequence[str]], seed: int) -> list[str]:
    """Texts of several kinds in one order."""
    whole = [text for part in parts for text in part]
    return [whole[n] for n in np.random.default_rng(seed).permutation(len(whole))]
