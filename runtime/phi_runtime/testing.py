"""For an app's own tests: a model that says what it is told to, without files and without an engine.

from phi_runtime.testing import fake_phi
phi = fake_phi("Hello.")
assert phi.chat("Hi").text == "Hello."

It is a real `Phi` over a fake backend: streams, stop texts, sessions, contexts, threads and the server behave as with
a bundle. Its tokens are bytes.
"""

from collections.abc import Callable
from pathlib import Path

import numpy as np

from phi_runtime.architecture.decoder import F32, CacheShape
from phi_runtime.generation.engine import Engine
from phi_runtime.model import Phi
from phi_runtime.package.open import Package
from phi_runtime.text.chat_templates import get_format
from phi_runtime.text.tokenizer import check_tokens, check_unicode

_BYTES = 256
END = _BYTES  # the token that ends an answer
Reply = str | Callable[[str], str]


class ByteTokenizer:
    """A token per byte of UTF-8, and `END`."""

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        check_unicode(text)
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        """Text of tokens, `END` left out. Raises TokenError for one outside the vocabulary."""
        check_tokens(tokens, _BYTES + 1)
        return bytes(t for t in tokens if t < _BYTES).decode("utf-8", "replace")

    def token_bytes(self, token: int) -> bytes:
        """The byte that a token spells, none for `END`."""
        check_tokens([token], _BYTES + 1)
        return bytes([token]) if token < _BYTES else b""


class FakeBackend:
    """Gives all probability to the next byte of the reply to what was read as a prompt.

    reply: the answer to every prompt, or a function of the prompt's text.
    """

    name = "fake"
    vocab_size = _BYTES + 1

    def __init__(self, reply: Reply, context: int = 4096) -> None:
        self.context = context
        self._reply, self._tokens, self._prompt = reply, list[int](), 0
        self._answer = b""

    @property
    def position(self) -> int:
        """Tokens in the cache."""
        return len(self._tokens)

    def forward(self, tokens: list[int], all_logits: bool) -> F32:
        """Append tokens; logits [T, vocab_size], or [1, vocab_size] of the last."""
        first = len(self._tokens)
        self._tokens = [*self._tokens, *tokens]
        if not all_logits:  # so the engine reads prompts
            self._prompt = len(self._tokens)
            text = ByteTokenizer().decode(self._tokens)
            self._answer = (self._reply if isinstance(self._reply, str) else self._reply(text)).encode()
        places = range(first, len(self._tokens)) if all_logits else [len(self._tokens) - 1]
        logits = np.full((len(places), self.vocab_size), -100.0, np.float32)
        for row, place in enumerate(places):
            said = place + 1 - self._prompt
            logits[row, self._answer[said] if 0 <= said < len(self._answer) else END] = 0.0
        return logits

    def trim(self, position: int) -> None:
        """Forget all tokens from `position` on."""
        self._tokens = self._tokens[:position]

    def state(self) -> bytes:
        """Nothing: tokens are all there is."""
        return b""

    def restore(self, state: bytes, tokens: list[int]) -> None:
        """Put the tokens back."""
        self._tokens = list(tokens)

    def close(self) -> None:
        """Forget everything."""
        self._tokens = []


def fake_phi(reply: Reply, context: int = 4096, chat: str = "phi3") -> Phi:
    """A `Phi` that answers every prompt with `reply`, or with what `reply` makes of the prompt's text.

    context: tokens, which are bytes here. chat: a format of `phi_runtime.text.chat_templates`. Raises UsageError for
    an unknown one.
    """
    backend = FakeBackend(reply, context)
    package = Package(
        path=Path("fake"),
        format="fake",
        folder=None,
        context=context,
        shape=CacheShape(vocab_size=backend.vocab_size, layers=1, heads=1, kv_heads=1, head_dim=1),
        stop_tokens=(END,),
        chat=get_format(chat),
        bos_token="",
        weights=0,
        staging=0,
        digest="fake",
    )
    return Phi(package, Engine(backend, package.stop_tokens), ByteTokenizer(), package.chat)


__all__ = ["END", "ByteTokenizer", "FakeBackend", "fake_phi"]
