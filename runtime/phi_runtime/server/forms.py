"""How each endpoint writes its answers, in OpenAI's words."""

import time
import uuid
from abc import ABC, abstractmethod
from typing import Any

from phi_runtime.engine import StopReason
from phi_runtime.model import Phi, Piece
from phi_runtime.server.requests import Asked

_FINISH: dict[StopReason | None, str] = {
    "stop_token": "stop",
    "stop_text": "stop",
    "max_tokens": "length",
    "context": "length",
}


class Form(ABC):
    """One answer, whole or in parts."""

    kind, prefix, chunk = "", "", ""

    def __init__(self, model: str, asked: Asked) -> None:
        self._model, self._asked = model, asked
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def head(self) -> dict[str, Any]:
        """What every part carries."""
        kind = self.chunk if self._asked.stream else self.kind
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def first(self) -> dict[str, Any] | None:
        """What goes out before the first token, if anything."""
        return None

    def part(self, piece: Piece, phi: Phi) -> dict[str, Any]:
        """One step of a stream."""
        stop = piece.step.stop
        return self._said(self.delta(piece.text), [piece], phi, _FINISH[stop] if stop else None)

    def whole(self, pieces: list[Piece], prompt_tokens: int, phi: Phi) -> dict[str, Any]:
        """All of an answer."""
        content = self.content("".join(p.text for p in pieces))
        said = self._said(content, pieces, phi, _FINISH[pieces[-1].step.stop])
        return said | {"usage": usage(prompt_tokens, len(pieces))}

    def _said(self, content: dict[str, Any], pieces: list[Piece], phi: Phi, finish: str | None) -> dict[str, Any]:
        logprobs = self.logprobs(pieces, phi) if self._asked.logprobs else None
        return self.head() | {"choices": [{"index": 0, "finish_reason": finish, "logprobs": logprobs} | content]}

    @abstractmethod
    def delta(self, text: str) -> dict[str, Any]:
        """The text of one step."""

    @abstractmethod
    def content(self, text: str) -> dict[str, Any]:
        """The text of a whole answer."""

    @abstractmethod
    def logprobs(self, pieces: list[Piece], phi: Phi) -> dict[str, Any]:
        """The log-probabilities of some steps."""


class Chat(Form):
    """Of /v1/chat/completions."""

    kind, prefix, chunk = "chat.completion", "chatcmpl", "chat.completion.chunk"

    def first(self) -> dict[str, Any]:
        """The role."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return self.head() | {"choices": [choice]}

    def delta(self, text: str) -> dict[str, Any]:
        """The text of one step."""
        return {"delta": {"content": text}}

    def content(self, text: str) -> dict[str, Any]:
        """The message."""
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def logprobs(self, pieces: list[Piece], phi: Phi) -> dict[str, Any]:
        """A row for each token."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = phi.detokenize([token])
            return {"token": text, "logprob": logprob, "bytes": list(phi.tokenizer.spell(token))}

        steps = [p.step for p in pieces]
        rows = [entry(s.token, s.logprob) | {"top_logprobs": [entry(*t) for t in s.top]} for s in steps]
        return {"content": rows, "refusal": None}


class Completion(Form):
    """Of /v1/completions."""

    kind, prefix, chunk = "text_completion", "cmpl", "text_completion"

    def delta(self, text: str) -> dict[str, Any]:
        """The text of one step."""
        return {"text": text}

    content = delta

    def logprobs(self, pieces: list[Piece], phi: Phi) -> dict[str, Any]:
        """A list for each figure."""
        steps = [p.step for p in pieces]
        return {
            "tokens": [phi.detokenize([s.token]) for s in steps],
            "token_logprobs": [s.logprob for s in steps],
            "top_logprobs": [{phi.detokenize([t]): p for t, p in s.top} for s in steps],
            "text_offset": [],
        }


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Tokens read and written."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
