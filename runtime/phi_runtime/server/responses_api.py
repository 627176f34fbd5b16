"""The answer of /v1/responses in its plain form, whole or as events: one message of text."""

import json
from typing import Any

from phi_runtime.model import Chunk, Phi
from phi_runtime.server.requests import CompletionRequest, ResponsesRequest
from phi_runtime.server.responses import FINISH, Answered, Form


class Responses(Form):
    """One message. Events are numbered, and each names its type twice, as OpenAI's clients expect."""

    kind, prefix, closing = "response", "resp", ""

    def __init__(self, model: str, asked: CompletionRequest, body: ResponsesRequest) -> None:
        super().__init__(model, asked)
        self._body, self._number = body, -1
        self._item = self._id.replace("resp", "msg", 1)

    def frame(self, data: dict[str, Any]) -> str:
        """An event of the stream."""
        self._number += 1
        numbered = data | {"sequence_number": self._number}
        return f"event: {data.get('type', 'error')}\ndata: {json.dumps(numbered)}\n\n"

    def first(self) -> list[dict[str, Any]]:
        """The response, its message and its text begin."""
        begun = self._response([], "in_progress", None)
        at = {"output_index": 0}
        return [
            {"type": "response.created", "response": begun},
            {"type": "response.in_progress", "response": begun},
            {"type": "response.output_item.added", "item": self._message("", "in_progress") | {"content": []}, **at},
            {"type": "response.content_part.added", "part": _text(""), **self._place()},
        ]

    def part(self, piece: Chunk, phi: Phi, index: int) -> dict[str, Any]:
        """One step."""
        return {"type": "response.output_text.delta", "delta": piece.text, "logprobs": [], **self._place()}

    def last(self, pieces: list[Chunk], read: int) -> list[dict[str, Any]]:
        """All of it ends, and stands once more as a whole."""
        text, status = "".join(p.text for p in pieces), _status(pieces)
        whole = self._response([self._message(text, status)], status, (read, len(pieces)))
        return [
            {"type": "response.output_text.done", "text": text, "logprobs": [], **self._place()},
            {"type": "response.content_part.done", "part": _text(text), **self._place()},
            {"type": "response.output_item.done", "item": self._message(text, status), "output_index": 0},
            {"type": f"response.{status}", "response": whole},
        ]

    def whole(self, answers: list[Answered], phi: Phi) -> dict[str, Any]:
        """The response."""
        (answer,) = answers
        text, status = "".join(p.text for p in answer.pieces), _status(answer.pieces)
        return self._response([self._message(text, status)], status, (len(answer.prompt), len(answer.pieces)))

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._item, "output_index": 0, "content_index": 0}

    def _message(self, text: str, status: str) -> dict[str, Any]:
        return {"id": self._item, "type": "message", "role": "assistant", "status": status, "content": [_text(text)]}

    def _response(self, output: list[dict[str, Any]], status: str, count: tuple[int, int] | None) -> dict[str, Any]:
        read, written = count or (0, 0)
        counts = {
            "input_tokens": read,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": written,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": read + written,
        }
        options, body = self._asked.options, self._body
        held = None if body.text is None else body.text.format
        return {
            "id": self._id,
            "object": self.kind,
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "model": self._model,
            "output": output,
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "store": False,
            "temperature": options["temperature"],
            "text": {"format": {"type": held.type if held is not None else "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": [],
            "top_p": options["top_p"],
            "truncation": "disabled",
            "usage": counts if count is not None else None,
        }


def _text(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _status(pieces: list[Chunk]) -> str:
    ended = bool(pieces) and FINISH[pieces[-1].step.finish_reason] == "stop"
    return "completed" if ended else "incomplete"
