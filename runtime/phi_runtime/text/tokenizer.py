"""Text to tokens and back, from the `tokenizer.json` that every checkpoint and bundle carries."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import tokenizers

from phi_runtime.errors import BundleError, NotFoundError, TokenError, UsageError

FILE = "tokenizer.json"
_REPLACEMENT = "\ufffd"
_SPACE = "\u2581"  # what SentencePiece writes for one
# What byte-level BPE writes for each byte (as of GPT-2): itself where it can be seen, else from U+0100 on.
_SEEN = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
_UNSEEN = [b for b in range(256) if b not in _SEEN]
_BYTES = {chr(b): b for b in _SEEN} | {chr(0x100 + i): b for i, b in enumerate(_UNSEEN)}


class TokenizerLike(Protocol):
    """Text to tokens and back."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written in it are recognised, none are added."""

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens; special tokens are left out."""

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token spells, which may be a part of a character; none for a special token."""


def _precompiled(raw: bytes) -> bool:
    """Whether a tokenizer.json has a normalizer of that type; the word may well be a token of its vocabulary."""
    # Letters may be escaped. What has neither the word nor such a letter need not be parsed, which takes a while.
    if b'"Precompiled"' not in raw and re.search(rb"\\u00[4-7]", raw) is None:
        return False
    left = [json.loads(raw).get("normalizer")]
    while left:
        found = left.pop()
        if isinstance(found, dict):
            if found.get("type") == "Precompiled":
                return True
            left += found.values()
        elif isinstance(found, list):
            left += found
    return False


class Tokenizer:
    """A thin door to Hugging Face's `tokenizers`: no template engine, no downloads."""

    def __init__(self, folder: Path) -> None:
        path = folder / FILE
        if not path.is_file():
            raise NotFoundError(f"{folder}: holds no {FILE}; copy it from the model's own repository")
        try:
            if _precompiled(path.read_bytes()):  # a broken map of it aborts the process
                raise BundleError(f"{path}: has a precompiled normalizer, which no Phi's has; take the model's own")
            self._t = tokenizers.Tokenizer.from_file(str(path))
            self._t.no_padding()  # all of a text's tokens and nothing else, whatever the file asks for
            self._t.no_truncation()
            self._byte_level = isinstance(self._t.decoder, tokenizers.decoders.ByteLevel)
            self._special = {i for i, t in self._t.get_added_tokens_decoder().items() if t.special}
        except (BundleError, KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # bare Exception for what it cannot read, a panic for what breaks it
            raise BundleError(f"{path}: is not a tokenizer that we can read ({e})") from None

    @property
    def vocab_size(self) -> int:
        """Number of ids that the tokenizer knows, added tokens included."""
        return self._t.get_vocab_size(with_added_tokens=True)

    @property
    def largest_id(self) -> int:
        """The largest id that it can give."""
        return max(self._t.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def added_tokens(self) -> list[str]:
        """Spellings of the tokens that are found before any text is split, special or not, by id."""
        return [token.content for _, token in sorted(self._t.get_added_tokens_decoder().items())]

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; special tokens written in it are recognised, none are added.

        Raises TokenError for text that is not Unicode (lone surrogates, as from a broken argument),
        BundleError for a tokenizer that is broken.
        """
        check_unicode(text)
        try:
            return self._t.encode(text, add_special_tokens=False).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as e:  # bare Exception for a broken vocabulary, a panic for broken settings
            raise BundleError(f"tokenizer.json cannot encode text ({e}); take the model's own") from None

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens; special tokens are left out. Raises TokenError for one that no vocabulary has."""
        check_tokens(tokens, _MOST)
        return self._t.decode(tokens)

    def token_bytes(self, token: int) -> bytes:
        """The bytes that a token spells, which may be a part of a character; none for a special token."""
        check_tokens([token], _MOST)
        if token in self._special:
            return b""
        piece = self._t.id_to_token(token) or ""
        if self._byte_level and all(c in _BYTES for c in piece):
            return bytes(_BYTES[c] for c in piece)
        if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
            return bytes([int(piece[3:5], 16)])
        return piece.replace(_SPACE, " ").encode()

    def special_tokens(self, text: str) -> list[str]:
        """The special tokens that a text spells out."""
        found = (self._t.id_to_token(t) or "" for t in self.encode(text) if t in self._special)
        return [piece for piece in found if piece in text]

    def id(self, token: str) -> int | None:
        """Id of one token by its spelling, None if there is no such token."""
        return self._t.token_to_id(token)


_MOST = 1 << 32  # a model's vocabulary may be wider than its tokenizer's


def check_tokens(tokens: list[int], vocab_size: int) -> None:
    """Raise TokenError for a token outside a vocabulary."""
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise TokenError(f"token {token} is outside the vocabulary of {vocab_size}")


def check_unicode(text: str) -> None:
    """Raise TokenError for text with lone surrogates, as from a broken argument."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise TokenError("the text is not valid Unicode; give it in UTF-8") from None


class StreamDecoder:
    """Turns a growing list of tokens into text, holding back what is not yet whole.

    A character spelt by several byte tokens comes out when its last byte is there, so the
    pieces are always valid UTF-8 and their concatenation is the decoding of the whole. After a special token, such as
    a role's, a text begins: it has the leading space taken off that the tokenizer puts before a text.
    """

    def __init__(self, tokenizer: TokenizerLike, prompt: list[int]) -> None:
        self._tokenizer = tokenizer
        # A few tokens of the prompt give the first pieces their context (a leading space, say).
        self._tokens = [] if prompt and self._special(prompt[-1]) else self._tail(prompt)
        self._start = len(tokenizer.decode(self._tokens))

    def push(self, token: int) -> str:
        """The text that became certain with this token, possibly empty."""
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        if text.endswith(_REPLACEMENT):
            return ""
        piece = text[self._start :]
        self._start = len(text)
        if len(self._tokens) > 64:
            self._tokens = self._tail(self._tokens)
            self._start = len(self._tokenizer.decode(self._tokens))
        return piece

    def flush(self) -> str:
        """What was still held back, at the end of the text."""
        return self._tokenizer.decode(self._tokens)[self._start :]

    def _tail(self, tokens: list[int]) -> list[int]:
        """The last few tokens, from the beginning of a character on, and with something to see among them."""
        start = max(0, len(tokens) - 4)
        while (
            start > 0
            and (
                b"\x80" <= self._tokenizer.token_bytes(tokens[start])[:1] < b"\xc0"  # inside a character
                or all(map(self._special, tokens[start:]))
            )
        ):
            start -= 1
        return tokens[start:]

    def _special(self, token: int) -> bool:
        """Whether it shows nothing; twice, because a space before a text shows nothing either."""
        return self._tokenizer.decode([token, token]) == ""


class TextStop:
    """Ends a text before the first of some strings, holding back what may be the beginning of one."""

    def __init__(self, stops: Sequence[str]) -> None:
        if not all(isinstance(s, str) and s for s in stops):
            raise UsageError("a stop text is empty; leave it out")
        self._stops, self._held = tuple(stops), ""
        self.found = False

    def push(self, text: str) -> str:
        """What is certain to stand before any stop; all of it once `found`."""
        text = self._held + text
        places = [at for s in self._stops if (at := text.find(s)) >= 0]
        if places:
            self.found, self._held = True, ""
            return text[: min(places)]
        most = max((len(s) - 1 for s in self._stops), default=0)
        for start in range(max(0, len(text) - most), len(text)):
            if any(s.startswith(text[start:]) for s in self._stops):
                self._held = text[start:]
                return text[:start]
        self._held = ""
        return text

    def flush(self) -> str:
        """What was held back, at the end of the text."""
        text, self._held = self._held, ""
        return text
