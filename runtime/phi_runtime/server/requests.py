"""The fields of OpenAI's API that this server honours, as typed records; anything else is refused by name."""

import secrets
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from phi_runtime.contract import Contract, StrictContract, decode
from phi_runtime.errors import UsageError
from phi_runtime.generation.config import GenerationConfig, Options
from phi_runtime.generation.engine import Policy
from phi_runtime.text.tools import Call, described, schema, written

MAX_CHOICES = 128  # prompts of a request, and answers to each
_DEFAULT = GenerationConfig()
_Text = Annotated[str, msgspec.Meta(min_length=1)]
_Bias = Annotated[dict[int, float], msgspec.Meta(max_length=1024)]


class StreamOptions(StrictContract, frozen=True):
    """What a stream carries beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(Contract, frozen=True):
    """A JSON Schema with its name."""

    schema: dict[str, Any]


class ResponseFormat(Contract, frozen=True):
    """What an answer is held to."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    def __post_init__(self) -> None:
        if self.type == "json_schema" and self.json_schema is None:
            raise ValueError("json_schema needs a schema")


class GenerationRequest(StrictContract, frozen=True, kw_only=True):
    """What both endpoints take. Null stands for the default. A temperature of 1 is OpenAI's default, not ours."""

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    max_completion_tokens: Annotated[int, msgspec.Meta(ge=-1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: _Bias | None = None
    seed: int | None = None
    n: Annotated[int, msgspec.Meta(ge=1, le=MAX_CHOICES)] | None = None
    stop: str | Annotated[list[str], msgspec.Meta(max_length=16)] | None = None
    top_logprobs: Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    response_format: ResponseFormat | None = None
    context_policy: Policy | None = None
    # Fields that say nothing about the answer.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # A field whose only honoured value is its default.
    modalities: list[Literal["text"]] | None = None


class TextPart(Contract, frozen=True):
    """A part of a message's content."""

    type: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.type != "text":
            raise ValueError(f"a part of type {self.type!r}; only text is supported")


class Function(Contract, frozen=True):
    """What a model may call. parameters: a JSON Schema of an object."""

    name: Annotated[str, msgspec.Meta(pattern=r"^[a-zA-Z0-9_.-]{1,64}(?!\n)$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None


class Tool(Contract, frozen=True):
    """A function."""

    type: Literal["function"]
    function: Function


class Chosen(Contract, frozen=True):
    """A function's name."""

    name: str


class ToolChoice(Contract, frozen=True):
    """The one function that is to be called."""

    type: Literal["function"]
    function: Chosen


class CalledFunction(Contract, frozen=True):
    """Of a call. arguments: a JSON object, as text."""

    name: str
    arguments: str = "{}"

    def __post_init__(self) -> None:
        try:
            fits = isinstance(msgspec.json.decode(self.arguments or "{}"), dict)
        except msgspec.DecodeError:
            fits = False
        if not fits:
            raise ValueError("arguments is no JSON object")


class ToolCall(Contract, frozen=True):
    """A call that the assistant made."""

    function: CalledFunction


class Message(Contract, frozen=True):
    """One turn. content: a text, or parts that are text; null where an assistant's turn had no text."""

    role: str
    content: str | list[TextPart] | None = None
    tool_calls: list[ToolCall] | None = None


class ChatRequest(GenerationRequest, frozen=True, kw_only=True):
    """The body of /v1/chat/completions."""

    messages: list[Message]
    logprobs: bool | None = None
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None

    def conversation(self) -> list[dict[str, Any]]:
        """The turns as `Phi.chat_prompt` takes them; tools are described behind the system's."""
        turns = [_turn(m) for m in self.messages]
        if said := described(self.functions()):
            if not turns or turns[0]["role"] != "system":
                turns.insert(0, {"role": "system", "content": ""})
            turns[0] = {"role": "system", "content": f"{turns[0]['content']}{said}"}
        return turns

    def functions(self) -> list[dict[str, Any]]:
        """Those that may be called. Raises UsageError for a choice that is none of them."""
        found = [msgspec.to_builtins(t.function) for t in self.tools or ()]
        if isinstance(self.tool_choice, ToolChoice):
            name = self.tool_choice.function.name
            found = [f for f in found if f["name"] == name]
            if not found:
                raise UsageError(f"tool_choice: there is no tool {name!r}")
        elif self.tool_choice == "required" and not found:
            raise UsageError("tool_choice: is required, and there are no tools")
        return [] if self.tool_choice == "none" else [{k: v for k, v in f.items() if v is not None} for f in found]

    @property
    def with_tools(self) -> bool:
        """Whether tools are talked of."""
        return bool(self.tools) or any(m.tool_calls for m in self.messages)

    @property
    def must_call(self) -> bool:
        """Whether the answer is to be a call."""
        return self.tool_choice == "required" or isinstance(self.tool_choice, ToolChoice)


class InputPart(Contract, frozen=True):
    """A part of an item's content: of type input_text, or output_text where a reply is sent back."""

    type: str
    text: str = ""

    def __post_init__(self) -> None:
        if self.type not in ("input_text", "output_text"):
            raise ValueError(f"a part of type {self.type!r}; only text is supported")


class InputItem(StrictContract, frozen=True):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]
    type: Literal["message"] = "message"
    id: str | None = None  # of a reply that is sent back
    status: str | None = None


class TextFormat(StrictContract, frozen=True):
    """What an answer is held to."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    schema: dict[str, Any] | None = None
    name: str | None = None
    description: str | None = None
    strict: bool | None = None

    def __post_init__(self) -> None:
        if self.type == "json_schema" and self.schema is None:
            raise ValueError("json_schema needs a schema")


class TextSettings(StrictContract, frozen=True):
    """Of the Responses API."""

    format: TextFormat | None = None


class ResponsesRequest(StrictContract, frozen=True, kw_only=True):
    """The body of /v1/responses, in its plain form: a conversation in, a message out, nothing remembered."""

    input: str | Annotated[list[InputItem], msgspec.Meta(min_length=1)]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, msgspec.Meta(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    stream: bool | None = None
    text: TextSettings | None = None
    # Fields that say nothing about the answer.
    metadata: dict[str, str] | None = None
    user: str | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    # Fields whose only honoured value is their default. A response is never stored.
    store: bool | None = None
    truncation: Literal["disabled"] | None = None
    background: Literal[False] | None = None
    previous_response_id: None = None
    tools: Annotated[list[Any], msgspec.Meta(max_length=0)] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None

    def as_chat(self) -> ChatRequest:
        """The same asked of /v1/chat/completions."""
        first = [Message("system", self.instructions)] if self.instructions is not None else []
        items = [InputItem("user", self.input)] if isinstance(self.input, str) else self.input
        held = None if self.text is None else self.text.format
        return ChatRequest(
            messages=[*first, *(Message(i.role, _joined(i.content)) for i in items)],
            model=self.model,
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
            response_format=None
            if held is None
            else ResponseFormat(held.type, None if held.schema is None else JsonSchema(held.schema)),
        )


def _joined(content: str | list[InputPart]) -> str:
    return content if isinstance(content, str) else "".join(p.text for p in content)


_Tokens = Annotated[list[int], msgspec.Meta(min_length=1)]


class TextRequest(GenerationRequest, frozen=True, kw_only=True):
    """The body of /v1/completions. prompt: a text, a list of tokens, or a list of either."""

    prompt: str | Annotated[list[str | int | _Tokens], msgspec.Meta(min_length=1)]
    logprobs: bool | Annotated[int, msgspec.Meta(ge=0, le=20)] | None = None
    echo: bool | None = None
    best_of: Literal[1] | None = None
    suffix: Literal[""] | None = None

    def prompts(self) -> list[str | list[int]]:
        """Each prompt apart. Raises UsageError."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        kinds = {type(p) for p in self.prompt}
        if kinds == {int}:
            return [self.prompt]  # type: ignore[list-item]
        if len(kinds) == 1 and len(self.prompt) <= MAX_CHOICES:
            return self.prompt  # type: ignore[return-value]
        raise UsageError(
            f"prompt: is neither a text, a list of tokens, nor a list of up to {MAX_CHOICES} of one of these"
        )


R = TypeVar("R", bound=StrictContract)


@dataclass(frozen=True)
class CompletionRequest:
    """One request, its defaults filled in. schema: of a JSON answer, None for any object; `constrained` says whether
    there is one at all. choices: answers to each prompt. echo: the prompt stands before its answer. max_tokens: None
    for all that the context holds, 0 for the echo alone.
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
    tools: bool = False
    called: bool = False


def parse(body: bytes, kind: type[R]) -> R:
    """The body of a request. Raises UsageError, naming the field."""
    try:
        return decode(body, kind)
    except ValueError as e:
        raise UsageError(str(e)) from None


def resolve(r: ChatRequest | TextRequest) -> CompletionRequest:
    """A request with its defaults filled in. Raises UsageError."""
    echo = isinstance(r, TextRequest) and bool(r.echo)
    if r.stream and echo:
        raise UsageError("echo: does not go with stream; leave one out")
    most = _or(r.max_completion_tokens, _or(r.max_tokens, _DEFAULT.max_tokens))
    if most == 0 and not echo:
        raise UsageError("max_tokens: is less than 1; -1 stands for all that the context holds")
    stops = [r.stop] if isinstance(r.stop, str) else r.stop or []
    options = Options(
        temperature=_or(r.temperature, 1.0),
        top_p=_or(r.top_p, _DEFAULT.top_p),
        top_k=_or(r.top_k, _DEFAULT.top_k),
        min_p=_or(r.min_p, _DEFAULT.min_p),
        repetition_penalty=_or(r.repetition_penalty, _DEFAULT.repetition_penalty),
        frequency_penalty=_or(r.frequency_penalty, _DEFAULT.frequency_penalty),
        presence_penalty=_or(r.presence_penalty, _DEFAULT.presence_penalty),
        logit_bias=tuple((r.logit_bias or {}).items()),
        seed=secrets.randbits(62) if r.seed in (None, -1) else r.seed,
        stop=tuple(s for s in stops if s),  # some clients send "" for none
        policy=_or(r.context_policy, _DEFAULT.policy),
    )
    # The old endpoint names how many of the likeliest tokens it wants; true and 1 are alike to Python, not to it.
    counted = r.logprobs is not None and not isinstance(r.logprobs, bool)
    if counted or r.top_logprobs is not None:
        options["top_logprobs"] = int(r.logprobs or 0) if counted else _or(r.top_logprobs, 0)
    held = r.response_format
    constrained = held is not None and held.type != "text"
    form = None if held is None or held.json_schema is None else held.json_schema.schema
    functions = r.functions() if isinstance(r, ChatRequest) else []
    called = isinstance(r, ChatRequest) and r.must_call
    if called and constrained:
        raise UsageError("response_format: does not go with a tool_choice that asks for a call; leave one out")
    if isinstance(r, ChatRequest) and called:
        form = schema(functions, 1 if r.parallel_tool_calls is False else None)
    return CompletionRequest(
        options=options,
        choices=_or(r.n, 1),
        echo=echo,
        max_tokens=None if most == -1 else most,
        stream=bool(r.stream),
        usage=r.stream_options is not None and r.stream_options.include_usage,
        logprobs=counted or r.logprobs is True,
        constrained=constrained or called,
        schema=form,
        tools=bool(functions),
        called=called,
    )


def _turn(m: Message) -> dict[str, Any]:
    content = "".join(p.text for p in m.content) if isinstance(m.content, list) else m.content
    if content is None and m.role == "assistant":
        content = ""
    if m.tool_calls and content is not None:
        content += written([Call(c.function.name, c.function.arguments) for c in m.tool_calls])
    return {"role": "system" if m.role == "developer" else m.role, "content": content}


V = TypeVar("V")


def _or(value: V | None, default: V) -> V:
    return default if value is None else value
