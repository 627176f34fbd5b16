"""Constrain answers to a JSON Schema, with llguidance."""

import json
from typing import Any

import numpy as np

from phi_runtime.architecture.decoder import F32
from phi_runtime.errors import MissingExtraError, UsageError
from phi_runtime.package.open import Package
from phi_runtime.text.tokenizer import FILE


class Grammars:
    """Makes constraints for one model's tokenizer."""

    def __init__(self, package: Package) -> None:
        self._package = package
        self._tokenizer: Any = None

    def json(self, schema: dict[str, Any] | None) -> "JsonConstraint":
        """A constraint to a schema, or to any JSON object. Raises UsageError for a schema that llguidance refuses."""
        return JsonConstraint(self._open(), {"type": "object"} if schema is None else schema)

    def _open(self) -> Any:
        if self._tokenizer is None:
            try:
                import llguidance
            except ImportError:
                raise MissingExtraError("llguidance", "server") from None
            if self._package.folder is None:
                raise UsageError("JSON schemas need a tokenizer.json beside the model; this GGUF file has none")
            self._tokenizer = llguidance.LLTokenizer(
                str(self._package.folder / FILE),
                n_vocab=self._package.shape.vocab_size,
                eos_token=list(self._package.stop_tokens),
            )
        return self._tokenizer


class JsonConstraint:
    """One answer's way through the grammar of a schema."""

    def __init__(self, tokenizer: Any, schema: dict[str, Any]) -> None:
        import llguidance
        import llguidance.numpy

        self._bits: Any = llguidance.numpy
        try:
            # Compact, or a small model may go on with blanks for as long as it is let.
            compact = {"x-guidance": {"whitespace_flexible": False}}
            grammar = llguidance.LLMatcher.grammar_from_json_schema(json.dumps(compact | schema))
        except ValueError as e:
            raise UsageError(f"response_format: the schema cannot be used ({_line(e)})") from None
        self._matcher = llguidance.LLMatcher(tokenizer, grammar)
        if self._matcher.is_error():
            raise UsageError(f"response_format: the schema cannot be used ({_line(self._matcher.get_error())})")
        self._mask = llguidance.numpy.allocate_token_bitmask(1, tokenizer.vocab_size)
        self._bits.fill_next_token_bitmask(self._matcher, self._mask, 0)
        if self._matcher.is_stopped():  # before a first token: such as a $ref that leads to itself
            raise UsageError("response_format: the schema cannot be used (no JSON fits it)")

    def mask(self, logits_V: F32) -> F32:
        """The logits, -inf where a token would break the schema."""
        self._bits.fill_next_token_bitmask(self._matcher, self._mask, 0)
        allowed = np.unpackbits(self._mask[0].view(np.uint8), bitorder="little")[: len(logits_V)].astype(bool)
        return np.where(allowed, logits_V, -np.inf).astype(np.float32)

    def accept(self, token: int) -> None:
        """The answer goes on with this token."""
        self._matcher.consume_token(token)


def _line(e: object) -> str:
    return str(e).strip().splitlines()[0][:300]
