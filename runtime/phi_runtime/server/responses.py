"""Responses of each endpoint, in OpenAI's format."""

import json
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from phi_runtime.generation.engine import FinishReason
from phi_runtime.model import Chunk, Phi
from phi_runtime.server.requests import CompletionRequest
from phi_runtime.text.tools import OPEN, read, shown

FINISH: dict[FinishReason | None, str] = {
    "stop_token": "stop",
    "stop_text": "stop",
    "max_tokens": "length",
    "context": "length",
}


# Of a token: its log-probability, None for the first of a text, and the likeliest ones.
Score = tuple[float | None, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class Answered:
    """One answer: its prompt, what of that is repeated before it, its steps, and the prompt's own scores if asked."""

    prompt: list[int]
    echoed: str
    pieces: list[Chunk]
    scores: list[Score] | None = None


class Form(ABC):
    """One answer, whole or in parts."""

    kind, prefix = "", ""
    closing = "data: [DONE]\n\n"  # of a stream

    def __init__(self, model: str, asked: CompletionRequest) -> None:
        self._model, self._asked = model, asked
        self._id, self._created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())

    def frame(self, data: dict[str, Any]) -> str:
        """An event of the stream."""
        return f"data: {json.dumps(data)}\n\n"

    def first(self) -> list[dict[str, Any]]:
        """What goes out before the first token."""
        return []

    @abstractmethod
    def part(self, piece: Chunk, phi: Phi, index: int) -> dict[str, Any]:
        """One step of the stream of an answer."""

    def last(self, pieces: list[Chunk], read: int) -> list[dict[str, Any]]:
        """What goes out behind the last token. read: tokens of the prompts."""
        return []

    @abstractmethod
    def whole(self, answers: list[Answered], phi: Phi) -> dict[str, Any]:
        """All answers."""


class Choices(Form):
    """Of the endpoints that answer with choices."""

    chunk = ""

    def head(self) -> dict[str, Any]:
        """What every part carries."""
        kind = self.chunk if self._asked.stream else self.kind
        return {"id": self._id, "object": kind, "created": self._created, "model": self._model}

    def part(self, piece: Chunk, phi: Phi, index: int) -> dict[str, Any]:
        """One step of the stream of an answer."""
        stop = piece.step.finish_reason
        choice = self._choice(self.delta(piece.text), self._logprobs([piece], phi), FINISH[stop] if stop else None)
        return self.head() | {"choices": [choice | {"index": index}]}

    def last(self, pieces: list[Chunk], read: int) -> list[dict[str, Any]]:
        """The usage, if asked."""
        return [self.head() | {"choices": [], "usage": usage(read, len(pieces))}] if self._asked.usage else []

    def whole(self, answers: list[Answered], phi: Phi) -> dict[str, Any]:
        """All answers; usage counts each prompt once."""
        choices = []
        for index, a in enumerate(answers):
            finish = FINISH[a.pieces[-1].step.finish_reason] if a.pieces else "length"
            text = a.echoed + "".join(p.text for p in a.pieces)
            logprobs = self._logprobs(a.pieces, phi, a)
            choices.append(self._choice(self.content(text), logprobs, finish) | {"index": index})
        read = sum(len(a.prompt) for a in answers[:: self._asked.choices])
        return self.head() | {"choices": choices, "usage": usage(read, sum(len(a.pieces) for a in answers))}

    def _logprobs(self, pieces: list[Chunk], phi: Phi, answered: Answered | None = None) -> dict[str, Any] | None:
        return self.logprobs(pieces, phi, answered) if self._asked.logprobs else None

    def _choice(self, content: dict[str, Any], logprobs: dict[str, Any] | None, finish: str | None) -> dict[str, Any]:
        return {"finish_reason": finish, "logprobs": logprobs} | content

    @abstractmethod
    def delta(self, text: str) -> dict[str, Any]:
        """The text of one step."""

    @abstractmethod
    def content(self, text: str) -> dict[str, Any]:
        """The text of a whole answer."""

    @abstractmethod
    def logprobs(self, pieces: list[Chunk], phi: Phi, answered: Answered | None) -> dict[str, Any]:
        """The log-probabilities of some steps, behind those of an echoed prompt."""


class Chat(Choices):
    """Of /v1/chat/completions."""

    kind, prefix, chunk = "chat.completion", "chatcmpl", "chat.completion.chunk"

    def __init__(self, model: str, asked: CompletionRequest) -> None:
        super().__init__(model, asked)
        self._said: dict[int, tuple[str, int]] = {}  # of each answer with tools: its text, and what was sent of it

    def first(self) -> list[dict[str, Any]]:
        """The role."""
        choice = {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
        return [self.head() | {"choices": [choice]}]

    def delta(self, text: str) -> dict[str, Any]:
        """The text of one step."""
        return {"delta": {"content": text}}

    def content(self, text: str) -> dict[str, Any]:
        """The message."""
        said, calls = self._read(text)
        message: dict[str, Any] = {"role": "assistant", "content": said, "refusal": None}
        if not calls:
            return {"message": message}
        message |= {"content": said or None, "tool_calls": calls}
        return {"message": message, "finish_reason": "tool_calls"}

    def part(self, piece: Chunk, phi: Phi, index: int) -> dict[str, Any]:
        """One step; what may become a call is sent when it is whole."""
        frame = super().part(piece, phi, index)
        if not self._asked.tools:
            return frame
        text, sent = self._said.get(index, ("", 0))
        text += piece.text
        choice = frame["choices"][0]
        if choice["finish_reason"] is None:
            until = 0 if self._asked.called else shown(text)
            choice["delta"] = {"content": text[sent:until]} if until > sent else {}
            self._said[index] = (text, max(sent, until))
            return frame
        said, calls = self._read(text)
        choice["delta"] = {"content": said[sent:]} if len(said) > sent else {}
        if calls:
            choice["delta"]["tool_calls"] = [c | {"index": n} for n, c in enumerate(calls)]
            choice["finish_reason"] = "tool_calls"
        return frame

    def _read(self, text: str) -> tuple[str, list[dict[str, Any]]]:
        if not self._asked.tools:
            return text, []
        said, calls = read(OPEN + text if self._asked.called else text)
        return said, [
            {
                "id": f"call_{uuid.uuid4().hex[:24]}",
                "type": "function",
                "function": {"name": c.name, "arguments": c.arguments},
            }
            for c in calls
        ]

    def logprobs(self, pieces: list[Chunk], phi: Phi, answered: Answered | None) -> dict[str, Any]:
        """A row for each token."""

        def entry(token: int, logprob: float) -> dict[str, Any]:
            text = phi.detokenize([token])
            return {"token": text, "logprob": logprob, "bytes": list(phi.tokenizer.token_bytes(token))}

        steps = [p.step for p in pieces]
        rows = [entry(s.token, s.logprob) | {"top_logprobs": [entry(*t) for t in s.top]} for s in steps]
        return {"content": rows, "refusal": None}


class Completion(Choices):
    """Of /v1/completions."""

    kind, prefix, chunk = "text_completion", "cmpl", "text_completion"

    def delta(self, text: str) -> dict[str, Any]:
        """The text of one step."""
        return {"text": text}

    content = delta

    def logprobs(self, pieces: list[Chunk], phi: Phi, answered: Answered | None) -> dict[str, Any]:
        """A list for each figure; text_offset counts characters of the whole text."""
        found: list[tuple[int, float | None, Sequence[tuple[int, float]]]] = []
        if answered is not None and answered.scores is not None:
            found += [(t, *row) for t, row in zip(answered.prompt, answered.scores, strict=True)]
        found += [(p.step.token, p.step.logprob, p.step.top) for p in pieces]
        texts = [phi.detokenize([token]) for token, _, _ in found]
        return {
            "tokens": texts,
            "token_logprobs": [logprob for _, logprob, _ in found],
            "top_logprobs": [
                None if logprob is None else {phi.detokenize([t]): p for t, p in top} for _, logprob, top in found
            ],
            "text_offset": [sum(map(len, texts[:i])) for i in range(len(texts))],
        }


def usage(prompt: int, completion: int) -> dict[str, int]:
    """Tokens read and written."""
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
