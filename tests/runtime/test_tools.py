"""Tools in phi-4-mini's format: the prompt, the calls that are read back, and the server's answers."""

import json
import threading
import time

import openai
import pytest
import transformers
import uvicorn
from support import Served, free_port

from phi_runtime.errors import ChatError
from phi_runtime.server.app import app
from phi_runtime.server.requests import ChatRequest, parse
from phi_runtime.testing import fake_phi
from phi_runtime.text.chat_templates import FORMATS, get_format
from phi_runtime.text.tools import Call, described, read, schema, shown, written

# phi-4-mini's published template.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' and 'tools' in message and message['tools'] is not "
    "none %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|tool|>' + message['tools'] + '<|/tool|>' + "
    "'<|end|>' }}{% else %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
WEATHER = {
    "name": "get_weather",
    "description": "The weather of a town — now.",
    "parameters": {
        "type": "object",
        "properties": {"town": {"enum": ["Bonn", "Rom"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
        "required": ["town", "days"],
        "additionalProperties": False,
    },
}
TIME = {"name": "get_time"}
TOOLS = [{"type": "function", "function": WEATHER}, {"type": "function", "function": TIME}]
SAY = [{"role": "user", "content": "How is the weather in Bonn?"}]
CALL = '<|tool_call|>[{"name": "get_weather", "arguments": {"town": "Bonn", "days": 2}}]<|/tool_call|>'


def test_a_conversation_with_tools_is_written_as_published(checkpoint):
    body = {
        "messages": [
            {"role": "system", "content": "Be brief."}, *SAY,
            {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": {
                "name": "get_weather", "arguments": '{"town": "Bonn", "days": 2}'}}]},
            {"role": "tool", "tool_call_id": "c1", "content": "sunny, 21 °C"},
        ],
        "tools": TOOLS,
    }  # fmt: skip
    asked = parse(json.dumps(body).encode(), ChatRequest)
    theirs = transformers.AutoTokenizer.from_pretrained(checkpoint)
    theirs.chat_template = TEMPLATE
    said = [
        {"role": "system", "content": "Be brief.", "tools": json.dumps([WEATHER, TIME], ensure_ascii=False)},
        SAY[0],
        {"role": "assistant", "content": CALL},
        {"role": "tool", "content": "sunny, 21 °C"},
    ]
    expected = theirs.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert get_format("phi4-mini").render(asked.conversation()) == expected
    asked = parse(json.dumps({"messages": SAY, "tools": TOOLS[1:]}).encode(), ChatRequest)
    assert (
        get_format("phi4-mini")
        .render(asked.conversation())
        .startswith('<|system|><|tool|>[{"name": "get_time"}]<|/tool|>')
    )
    for name in set(FORMATS) - {"phi4-mini", "phi3-small"}:
        if "tool" not in get_format(name).roles:
            with pytest.raises(ChatError, match="no place for the role"):
                get_format(name).render([{"role": "tool", "content": "x"}])


def test_calls_are_read_back():
    two = [Call("f", '{"a": "é \\" ]<|x"}'), Call("g", "{}")]
    assert read(written(two)) == ("", two) and read("Well.\n" + written(two) + " \n") == ("Well.", two)
    assert read(written(two).replace("<|/tool_call|>", "")) == ("", two)  # the model ended its turn there
    assert read('<|tool_call|>{"name": "f", "parameters": {"a": 1}}<|/tool_call|>') == ("", [Call("f", '{"a": 1}')])
    for text in (
        "plain", "<|tool_call|>", "<|tool_call|>[]<|/tool_call|>", "<|tool_call|>[{]", "<|tool_call|>" + "[" * 100_000,
        '<|tool_call|>[{"name": 3, "arguments": {}}]', '<|tool_call|>[{"name": "f", "arguments": "x"}]',
        '<|tool_call|>[{"name": "f", "arguments": {}}] and more', '<|tool_call|>[{"arguments": {}}]',
    ):  # fmt: skip
        assert read(text) == (text, [])
    assert written([]) == described([]) == ""
    for text, count in (
        ("abc", 3),
        ("abc<", 3),
        ("abc<|tool", 3),
        ("abc<|tool_call|>[", 3),
        ("a < b", 5),
        ("<|too_", 6),
        ("", 0),
    ):
        assert shown(text) == count, text


def test_a_schema_of_calls():
    one = schema([TIME], 1)
    assert one["maxItems"] == 1 and one["items"]["properties"]["name"] == {"const": "get_time"}
    assert len(schema([WEATHER, TIME], None)["items"]["anyOf"]) == 2


class Serving:
    """The server in this process, over a model that says what it is told to."""

    def __init__(self, reply, chat="phi4-mini"):
        port = free_port()
        self.server = uvicorn.Server(uvicorn.Config(app(fake_phi(reply, chat=chat)), port=port, log_level="error"))
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)

    def __enter__(self):
        return self.client

    def __exit__(self, *_):
        self.server.should_exit = True
        self.thread.join()


def streamed(client, **options):
    """The text, the calls and the reason that a stream adds up to, and its parts."""
    parts = list(client.chat.completions.create(model="m", messages=SAY, stream=True, **options))
    deltas = [p.choices[0].delta for p in parts]
    calls = [c for d in deltas for c in d.tool_calls or ()]
    return "".join(d.content or "" for d in deltas), calls, parts[-1].choices[0].finish_reason, deltas


def test_a_model_that_calls_is_understood_by_the_sdk():
    with Serving(f"I look.{CALL}") as client:
        whole = client.chat.completions.create(model="m", messages=SAY, tools=TOOLS)
        (call,) = whole.choices[0].message.tool_calls
        assert whole.choices[0].finish_reason == "tool_calls" and whole.choices[0].message.content == "I look."
        assert call.function.name == "get_weather" and json.loads(call.function.arguments) == {
            "town": "Bonn",
            "days": 2,
        }
        text, calls, reason, _ = streamed(client, tools=TOOLS)
        assert (
            (text, reason) == ("I look.", "tool_calls")
            and calls[0].function.arguments == call.function.arguments
            and calls[0].index == 0
        )
        again = [*SAY, whole.choices[0].message, {"role": "tool", "tool_call_id": call.id, "content": "sunny"}]
        client.chat.completions.create(model="m", messages=again, tools=TOOLS)
        plain = client.chat.completions.create(model="m", messages=SAY, tools=TOOLS, tool_choice="none")
        assert plain.choices[0].message.tool_calls is None and "<|tool_call|>" in plain.choices[0].message.content
    with Serving("No <| call |> here, 1 < 2 <|tool_call") as client:
        text, calls, reason, deltas = streamed(client, tools=TOOLS)
        assert (text, calls, reason) == ("No <| call |> here, 1 < 2 <|tool_call", [], "stop") and len(deltas) > 20
        whole = client.chat.completions.create(model="m", messages=SAY, tools=TOOLS)
        assert whole.choices[0].message.content == text and whole.choices[0].message.tool_calls is None


def test_a_call_that_is_required_keeps_to_the_tool_s_schema(bundles):
    server = Served(bundles / "onnx", "--chat-format", "phi4-mini")
    try:
        client = server.client()
        for seed in range(3):
            for choice in ("required", {"type": "function", "function": {"name": "get_weather"}}):
                tools = TOOLS[:1] if choice == "required" else TOOLS
                options = {
                    "tools": tools,
                    "tool_choice": choice,
                    "parallel_tool_calls": False,
                    "seed": seed,
                    "max_tokens": 80,
                }
                made = client.chat.completions.create(model="m", messages=SAY, **options).choices[0]
                (call,) = made.message.tool_calls
                given = json.loads(call.function.arguments)
                assert made.finish_reason == "tool_calls" and made.message.content is None
                assert given["town"] in ("Bonn", "Rom") and 1 <= given["days"] <= 9 and len(given) == 2
                text, calls, reason, _ = streamed(client, **options)
                assert text == "" and calls[0].function.arguments == call.function.arguments and reason == "tool_calls"
        for options, says in (
            ({"tool_choice": "required"}, "there are no tools"),
            ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "there is no tool 'x'"),
            ({"tools": TOOLS, "tool_choice": "required", "response_format": {"type": "json_object"}}, "leave one out"),
            ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "name"),
            ({"tools": [{"type": "web_search"}]}, "type"),
        ):
            with pytest.raises(openai.BadRequestError, match=says):
                client.chat.completions.create(model="m", messages=SAY, **options)
        wrong = {
            "role": "assistant",
            "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "["}}],
        }
        with pytest.raises(openai.BadRequestError, match="no JSON object"):
            client.chat.completions.create(model="m", messages=[*SAY, wrong])
    finally:
        server.close()
