"""Texts to token ids as bytes, for corpora: the ids of `Tokenizer.encode`, several times as fast where it can be.

A BPE without a pre-tokenizer (Llama's, phi-3's) takes a text as one word. Where no token of its vocabulary reaches
from one line into the next, nor from a word into the spaces behind it, no merge does: pieces cut there have the ids
that they have within the text, and those of a piece that was met before are known.
"""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from phi_runtime.errors import UsageError
from phi_runtime.text.tokenizer import FILE, Tokenizer, check_unicode
from phi_train.data.tokenizer import END_OF_TEXT

_SPACE = "\u2581"  # what stands for one
_PIECE = re.compile(f"{_SPACE}+[^{_SPACE}\n]*|\n|[^{_SPACE}\n]+")
_CROSSES = re.compile(f"[^{_SPACE}]{_SPACE}|.\n|\n.", re.DOTALL)
_MOST = 500_000  # pieces that are remembered, of up to `_LONG` characters: some 110 MB
_LONG = 64


class CorpusEncoder:
    """One tokenizer; `dtype` is that of the ids."""

    def __init__(self, folder: Path) -> None:
        """Raises what `Tokenizer` raises."""
        self.tokenizer = Tokenizer(folder)
        self.dtype = "uint16" if self.tokenizer.vocab_size <= 1 << 16 else "uint32"
        self._known: dict[str, bytes] = {}
        self._bare: tokenizers.Tokenizer | None = None
        raw = json.loads((folder / FILE).read_bytes())
        if _cuts_are_exact(raw):
            self._bare = tokenizers.Tokenizer.from_str(json.dumps(raw | {"normalizer": None, "post_processor": None}))
            self._bare.no_padding()
            self._bare.no_truncation()
            contents = [re.escape(t["content"]) for t in raw["added_tokens"]]
            self._added = re.compile("|".join(contents) or "(?!)")
            (self._newline,) = self._bare.encode("\n", add_special_tokens=False).ids

    def encode(self, text: str) -> bytes:
        """Token ids of a text, two or four bytes each; special tokens written in it are recognised, none are added."""
        check_unicode(text)
        spaced = _SPACE + text.replace(" ", _SPACE)
        if self._bare is None or not text or self._added.search(text) or self._added.search(spaced):
            return np.array(self.tokenizer.encode(text), self.dtype).tobytes()
        pieces = _PIECE.findall(spaced)
        new = list({p for p in pieces if p not in self._known})
        if new:
            self._learn(new)
        out = b"".join(map(self._known.__getitem__, pieces))
        for p in new:
            if len(p) > _LONG:
                del self._known[p]
        if len(self._known) > _MOST:
            self._known.clear()
        return out

    def _learn(self, pieces: list[str]) -> None:
        """As the lines of one text, which costs less than a call for each."""
        assert self._bare is not None
        lines = [p for p in pieces if p != "\n"]
        self._known["\n"] = np.array([self._newline], self.dtype).tobytes()
        if not lines:
            return
        (encoded,) = self._bare.encode_batch_fast(["\n".join(lines)], add_special_tokens=False)
        ids = np.array(encoded.ids)
        ends = [*np.nonzero(ids == self._newline)[0].tolist(), len(ids)]
        stored, size, start = ids.astype(self.dtype).tobytes(), np.dtype(self.dtype).itemsize, 0
        for line, end in zip(lines, ends, strict=True):
            self._known[line] = stored[start * size : end * size]
            start = end + 1


def open_encoder(folder: Path) -> tuple[CorpusEncoder, bytes]:
    """With the token that ends a document, as it stands behind its own. Raises UsageError, NotFoundError."""
    encoder = CorpusEncoder(folder)
    end = encoder.tokenizer.id(END_OF_TEXT)
    if end is None:
        raise UsageError(f"{folder}: its tokenizer has no {END_OF_TEXT}, which separates documents")
    return encoder, np.array([end], encoder.dtype).tobytes()


def _cuts_are_exact(raw: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is such a BPE, and its vocabulary lets no merge across a cut."""
    model, normalizer = raw["model"], raw.get("normalizer")
    wanted = [
        {"type": "Prepend", "prepend": _SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
    ]
    plain = {"dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "ignore_merges": False}
    return (
        model.get("type") == "BPE"
        and raw.get("pre_tokenizer") is None
        and normalizer == {"type": "Sequence", "normalizers": wanted}
        and all((model.get(key) or value) == value for key, value in plain.items())
        and bool(model.get("byte_fallback"))
        and all(f"<0x{b:02X}>" in model["vocab"] for b in range(256))  # so that nothing is unknown
        and not any(map(_CROSSES.search, model["vocab"]))
    )
