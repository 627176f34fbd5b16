"""What clients may ask, checked: the fields of OpenAI's API that this server honours, and no silent rest."""

import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from phi_runtime.errors import UsageError
from phi_runtime.generation.config import GenerationConfig, Options

_MOST_CHOICES = 128  # prompts of a request, and answers to each
# Fields that say nothing about the answer, and those whose only honoured value is their default.
_HARMLESS = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
_DEFAULT_ONLY: dict[str, tuple[Any, ...]] = {
    "best_of": (1, None),
    "suffix": (None, ""),
    "tools": ([], None),
    "tool_choice": ("none", "auto", None),
    "parallel_tool_calls": (True, False, None),
    "modalities": (["text"], None),
}
_OURS = {
    "model", "messages", "prompt", "stream", "stream_options", "max_tokens", "max_completion_tokens", "temperature",
    "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty", "logit_bias", "seed", "n",
    "echo", "stop", "logprobs", "top_logprobs", "response_format",
    "context_policy",
}  # fmt: skip


@dataclass(frozen=True)
class CompletionRequest:
    """One request. schema: of a JSON answer, None for any object; `constrained` says whether there is one at all.
    choices: answers to each prompt. echo: the prompt stands before its answer. max_tokens: None for all that the
    context holds, 0 for the echo alone.
    """

    options: Options
    choices: int
    echo: bool
    max_tokens: int | None
    stream: bool
    usage: bool
    logprobs: bool
    constrained: bool
    schema: dict[str, Any] | None


def parse(body: Any) -> CompletionRequest:
    """The common fields of both endpoints. Raises UsageError, naming the field."""
    if not isinstance(body, dict):
        raise UsageError("the body is not a JSON object")
    for name, value in body.items():
        if name in _DEFAULT_ONLY:
            if value not in _DEFAULT_ONLY[name]:
                raise UsageError(f"{name}: this server does not support it; leave it out")
        elif name not in _OURS and name not in _HARMLESS:
            raise UsageError(f"{name}: unknown field; leave it out")
    d = GenerationConfig()
    options = Options(
        temperature=_field(body, "temperature", float, 1.0),  # as OpenAI's API has it; ours is 0
        top_p=_field(body, "top_p", float, d.top_p),
        top_k=_field(body, "top_k", int, d.top_k),
        min_p=_field(body, "min_p", float, d.min_p),
        repetition_penalty=_field(body, "repetition_penalty", float, d.repetition_penalty),
        frequency_penalty=_field(body, "frequency_penalty", float, d.frequency_penalty),
        presence_penalty=_field(body, "presence_penalty", float, d.presence_penalty),
        logit_bias=_bias(body.get("logit_bias")),
        seed=_seed(body),
        stop=_stop(body.get("stop")),
        policy=_field(body, "context_policy", str, d.policy),
    )
    echo = _field(body, "echo", bool, False)
    most = _field(body, "max_completion_tokens", int, None)
    most = _field(body, "max_tokens", int, d.max_tokens) if most is None else most
    if most < -1 or (most == 0 and not echo):
        raise UsageError("max_tokens: is less than 1; -1 stands for all that the context holds")
    choices = _field(body, "n", int, 1)
    if not 1 <= choices <= _MOST_CHOICES:
        raise UsageError(f"n: is not between 1 and {_MOST_CHOICES}")
    logprobs = body.get("logprobs")
    wanted = _field(body, "top_logprobs", int, None)
    if isinstance(logprobs, int) and not isinstance(logprobs, bool):  # the old endpoint's way to say it
        logprobs, wanted = True, logprobs
    if wanted is not None:
        if not 0 <= wanted <= 20:
            raise UsageError("top_logprobs: is not between 0 and 20")
        options["top_logprobs"] = wanted
    if logprobs not in (None, True, False):
        raise UsageError("logprobs: is of another type")
    constrained, schema = _response_format(body.get("response_format"))
    stream_options = body.get("stream_options") or {}
    if not isinstance(stream_options, dict):
        raise UsageError("stream_options: is of another type")
    usage = bool(stream_options.get("include_usage"))
    stream = _field(body, "stream", bool, False)
    if stream and echo:
        raise UsageError("echo: does not go with stream; leave one out")
    return CompletionRequest(
        options, choices, echo, None if most == -1 else most, stream, usage, bool(logprobs), constrained, schema
    )


def parse_messages(body: dict[str, Any]) -> list[dict[str, Any]]:
    """The conversation; content may be a text or a list of parts that are text. Raises UsageError."""
    messages = body.get("messages")
    if not isinstance(messages, list):
        raise UsageError("messages: is missing or no list")
    out = []
    for i, message in enumerate(messages):
        if not isinstance(message, dict):
            raise UsageError(f"messages[{i}]: is no object")
        content = message.get("content")
        if isinstance(content, list):
            if not all(
                isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in content
            ):
                raise UsageError(f"messages[{i}].content: has a part that is no text; only text is supported")
            content = "".join(p["text"] for p in content)
        if content is None and message.get("role") == "assistant":  # as clients send a turn that had no text
            content = ""
        role = message.get("role")
        out.append({"role": "system" if role == "developer" else role, "content": content})
    return out


def parse_prompts(body: dict[str, Any]) -> list[str | list[int]]:
    """The prompts: a text, a list of tokens, or a list of either. Raises UsageError."""
    prompt = body.get("prompt")
    if isinstance(prompt, str) or (isinstance(prompt, list) and prompt and all(type(t) is int for t in prompt)):
        return [prompt]
    if isinstance(prompt, list) and 0 < len(prompt) <= _MOST_CHOICES:
        alike = all(isinstance(p, str) for p in prompt)
        if alike or all(isinstance(p, list) and p and all(type(t) is int for t in p) for p in prompt):
            return prompt
    raise UsageError(
        f"prompt: is neither a text, a list of tokens, nor a list of up to {_MOST_CHOICES} of one of these"
    )


def _seed(body: dict[str, Any]) -> int:
    """The seed asked for; a new one for each request that names none, or -1."""
    seed: int = _field(body, "seed", int, -1)
    return secrets.randbits(62) if seed == -1 else seed


def _bias(value: Any) -> tuple[tuple[int, float], ...]:
    if value is None:
        return ()
    try:
        found = tuple((int(token), float(bias)) for token, bias in value.items())
    except (AttributeError, TypeError, ValueError):
        raise UsageError("logit_bias: is no object of tokens and numbers") from None
    if len(found) > 1024:
        raise UsageError("logit_bias: holds more than 1024 tokens")
    return found


def _field(body: dict[str, Any], name: str, kind: Callable[..., Any], default: Any) -> Any:
    value = body.get(name)
    if value is None:
        return default
    good = isinstance(value, (int, float)) if kind is float else isinstance(value, kind)  # type: ignore[arg-type]
    if not good or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"{name}: is of another type")
    return value


def _stop(value: Any) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if isinstance(stops, list):
        stops = [s for s in stops if s != ""]  # which clients send for none
    if not isinstance(stops, list) or len(stops) > 16 or not all(isinstance(s, str) and s for s in stops):
        raise UsageError("stop: is neither a text nor a list of up to 16 texts")
    return tuple(stops)


def _response_format(value: Any) -> tuple[bool, dict[str, Any] | None]:
    kind = value.get("type") if isinstance(value, dict) else None
    if value is None or kind == "text":
        return False, None
    if kind == "json_object":
        return True, None
    if kind == "json_schema":
        schema = value.get("json_schema")
        schema = schema.get("schema") if isinstance(schema, dict) else None
        if isinstance(schema, dict):
            return True, schema
    raise UsageError("response_format: is none of text, json_object, and json_schema with a schema")
