"""`phi-run serve` as its users meet it: the real process, the openai client, the page's own calls."""

import asyncio
import http.client
import json
import time
from concurrent.futures import ThreadPoolExecutor

import jsonschema
import openai
import pytest
from support import Served, run

from phi_runtime.server.app import _Stream


@pytest.fixture(scope="module")
def served(bundles):
    server = Served(bundles / "gguf", "--queue", 16)
    yield server
    server.close()


SAY = [{"role": "user", "content": "def f(x):"}]


def test_chat_whole_and_streamed_are_one(served):
    client = served.client()
    assert [m.id for m in client.models.list()] == ["gguf"]
    whole = client.chat.completions.create(model="gguf", messages=SAY, max_tokens=12, temperature=0)
    assert whole.usage.completion_tokens == 12 and whole.choices[0].finish_reason == "length"
    parts = list(
        client.chat.completions.create(
            model="gguf",
            messages=SAY,
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(p.choices[0].delta.content or "" for p in parts if p.choices) == whole.choices[0].message.content
    assert [p.choices[0].finish_reason for p in parts if p.choices][-1] == "length"
    assert parts[-1].usage == whole.usage


def test_completions_seed_stop_and_logprobs(served):
    client = served.client()

    def complete(**options):
        return client.completions.create(model="gguf", prompt="def f(x):", max_tokens=20, **options)

    one, other = (complete(seed=7, temperature=1.0).choices[0].text for _ in range(2))
    assert one == other != complete(seed=8, temperature=1.0).choices[0].text
    whole = complete(temperature=0).choices[0].text
    stop = whole[4:6]
    stopped = complete(temperature=0, stop=stop).choices[0]
    assert stopped.text == whole[: whole.index(stop)] and stopped.finish_reason == "stop"
    chat = client.chat.completions.create(
        model="gguf", messages=SAY, max_tokens=3, temperature=0, logprobs=True, top_logprobs=4
    )
    for entry in chat.choices[0].logprobs.content:
        assert len(entry.top_logprobs) == 4
        assert entry.top_logprobs[0].logprob == entry.logprob < 0


def test_answers_keep_to_a_schema(served):
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "n": {"enum": [1, 2, 3]}},
        "required": ["name", "n"],
        "additionalProperties": False,
    }
    for seed in range(5):
        answer = served.client().chat.completions.create(
            model="gguf",
            messages=SAY,
            max_tokens=120,
            seed=seed,
            response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}},
        )
        said = json.loads(answer.choices[0].message.content)
        assert set(said) == {"name", "n"} and said["n"] in (1, 2, 3) and len(said["name"]) <= 8
        assert answer.choices[0].finish_reason == "stop"
    for refused in ({"type": "nonsense"}, {"$ref": "#"}, {"anyOf": []}):
        with pytest.raises(openai.BadRequestError, match="schema cannot be used"):
            served.client().chat.completions.create(
                model="gguf",
                messages=SAY,
                response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": refused}},
            )


def test_eight_clients_at_once_get_what_each_would_alone(served):
    prompts = [f"def f{i}(x):\n" for i in range(8)]

    def complete(prompt):
        made = served.client().completions.create(model="gguf", prompt=prompt, max_tokens=16, temperature=0)
        return made.choices[0].text

    alone = [complete(p) for p in prompts]
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(complete, prompts)) == alone


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_answer(served, stream):
    body = {"prompt": "x", "max_tokens": 480, "stream": stream, "stop": "\x00never", "temperature": 5}
    for _ in range(5):  # on a busy machine an answer may be over before its client leaves
        requests, cancelled, generated = (
            served.metric(f"phi_{name}_total") for name in ("requests", "cancelled", "generated_tokens")
        )
        connection = http.client.HTTPConnection("127.0.0.1", served.port)
        connection.request("POST", "/v1/completions", json.dumps(body), {"Content-Type": "application/json"})
        while served.metric("phi_requests_total") == requests:
            time.sleep(0.001)
        while served.metric("phi_generated_tokens_total") < generated + 3 and served.metric("phi_requests_inside"):
            time.sleep(0.001)
        connection.sock.close()
        connection.close()
        while served.metric("phi_requests_inside"):
            time.sleep(0.01)
        if served.metric("phi_cancelled_total") == cancelled + 1:
            assert served.metric("phi_generated_tokens_total") < generated + 400
            return
    raise AssertionError("the answers went on")


def test_a_stream_left_while_it_is_sent_is_closed_at_once():
    """The generator holds the engine's turn; nobody else gets it before the generator is closed."""
    sending, said = asyncio.Event(), []

    async def events():
        try:
            yield "data: x\n\n"
        finally:
            said.append("closed")

    async def receive():
        await sending.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        if message["type"] == "http.response.body":
            sending.set()
            await asyncio.sleep(60)

    generator = events()  # held here, so that no garbage collection closes it
    stream = _Stream(generator, lambda: said.append("over"))
    asyncio.run(stream({"type": "http", "asgi": {"spec_version": "2.3"}}, receive, send))
    assert said == ["closed", "over"]


def test_what_cannot_be_asked_is_refused_by_name(served):
    client = served.client()
    for options, says in (
        ({"n": 0}, "n: expected"),
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"frequency_penalty": 3}, "frequency_penalty"),
        ({"extra_body": {"tmperature": 1}}, r"tmperature: unknown field \(did you mean temperature\?\)"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"extra_body": {"echo": True}}, "echo: unknown field"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"stop": [5]}, "stop"),
    ):
        with pytest.raises(openai.BadRequestError, match=says):
            client.chat.completions.create(model="gguf", messages=SAY, **options)
    for messages, says in (
        ([], "empty"),
        ([{"role": "tool", "content": "x", "tool_call_id": "1"}], "no place for the role"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:,"}}]}], "only text"),
        ([{"role": "user", "content": "word " * 2000}], "the context holds"),
    ):
        with pytest.raises(openai.BadRequestError, match=says):
            client.chat.completions.create(model="gguf", messages=messages)
    for tokens in ([], [10**6], [-1], [["x"]], ["x", 5]):
        assert served.ask("POST", "/v1/completions", json.dumps({"prompt": tokens}))[0] == 400


def test_what_ordinary_clients_send_is_answered(served):
    client = served.client()
    seen = set()
    for _ in range(8):  # no seed: each request draws anew
        answer = client.completions.create(model="gguf", prompt="def f(", max_tokens=8, temperature=1)
        seen.add(answer.choices[0].text)
    assert len(seen) > 1
    given = [
        client.completions.create(model="gguf", prompt="def f(", max_tokens=8, temperature=1, seed=7) for _ in range(2)
    ]
    assert given[0].choices[0].text == given[1].choices[0].text
    several = client.completions.create(model="gguf", prompt=["def f(", "import"], n=2, max_tokens=4, temperature=1)
    assert [c.index for c in several.choices] == [0, 1, 2, 3]
    assert several.usage.completion_tokens <= 16
    echoed = client.completions.create(
        model="gguf", prompt="def f(x):", max_tokens=2, temperature=0, logprobs=1, echo=True
    )
    (choice,) = echoed.choices
    assert choice.text.startswith("def f(x):")
    rows = choice.logprobs
    assert rows.token_logprobs[0] is None and all(p <= 0 for p in rows.token_logprobs[1:])
    assert len(rows.tokens) == len(rows.token_logprobs) == len(rows.top_logprobs) == len(rows.text_offset)
    assert rows.text_offset == [sum(map(len, rows.tokens[:i])) for i in range(len(rows.tokens))]
    biased = client.completions.create(
        model="gguf", prompt="def f(", max_tokens=3, temperature=0, logit_bias={"42": 100}
    )
    assert len(set(served_tokens(biased))) == 1
    for options in (
        {"stop": ""},
        {"stop": None, "seed": None, "logit_bias": None, "n": None, "presence_penalty": None},
        {"frequency_penalty": 0.5, "presence_penalty": 0.5, "extra_body": {"top_k": 5}},
        {"seed": -1},
    ):
        assert client.chat.completions.create(model="gguf", messages=SAY, max_tokens=3, **options).choices
    body = {"messages": [*SAY, {"role": "assistant", "content": None}, *SAY], "max_tokens": 3}
    assert served.ask("POST", "/v1/chat/completions", json.dumps(body))[0] == 200
    whole = {"prompt": "def f(", "max_tokens": -1, "stop": ["\n"], "temperature": 0}
    assert served.ask("POST", "/v1/completions", json.dumps(whole))[0] == 200


def served_tokens(answer):
    """The pieces of an answer of equal tokens."""
    text = answer.choices[0].text
    third = len(text) // 3
    return [text[:third], text[third : 2 * third], text[2 * third :]]


def test_hostile_requests_are_answered_and_forgotten(served):
    post = "/v1/completions"
    assert served.ask("POST", post, "{")[0] == 400
    assert served.ask("POST", post, "[" * 100_000)[0] == 400
    assert served.ask("POST", post, "[1]")[0] == 400
    assert served.ask("POST", post, '{"prompt": "\\ud800"}')[0] == 400
    assert served.ask("POST", post, b"\xff\xfe")[0] == 400
    assert served.ask("POST", post, "x" * 5_000_000)[0] == 413
    assert served.ask("POST", post, "{}", {"Content-Type": "text/plain"})[0] == 415
    assert served.ask("GET", "/health", headers={"Host": "evil.example"})[0] == 400
    assert served.ask("GET", post)[0] == 405
    assert served.ask("GET", "/../../etc/passwd")[0] == 404
    assert served.ask("GET", "/health")[0] == 200


def test_the_responses_api_answers_whole_and_streamed(served):
    client = served.client()
    options = {"model": "gguf", "input": "def f(x):", "max_output_tokens": 12, "temperature": 0}
    chat = client.chat.completions.create(model="gguf", messages=SAY, max_tokens=12, temperature=0)
    whole = client.responses.create(**options)
    assert whole.output_text == chat.choices[0].message.content
    assert (whole.usage.input_tokens, whole.usage.output_tokens) == (chat.usage.prompt_tokens, 12)
    assert whole.status == "incomplete" and whole.incomplete_details.reason == "max_output_tokens"
    parts = [{"type": "input_text", "text": "def f("}, {"type": "input_text", "text": "x):"}]
    listed = client.responses.create(**options | {"input": [{"role": "user", "content": parts}]})
    assert listed.output_text == whole.output_text
    told = client.responses.create(**options, instructions="Write Python.")
    system = [{"role": "system", "content": "Write Python."}, *SAY]
    assert (
        told.usage.input_tokens
        == client.chat.completions.create(model="gguf", messages=system, max_tokens=1).usage.prompt_tokens
    )
    events = list(client.responses.create(**options, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    kinds = [e.type for e in events]
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[-4:] == [
        "response.output_text.done", "response.content_part.done", "response.output_item.done", "response.incomplete",
    ]  # fmt: skip
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == whole.output_text
    assert events[-1].response.output_text == whole.output_text and events[-1].response.usage == whole.usage
    schema = {"type": "json_schema", "name": "a", "schema": {"type": "boolean"}}
    with client.responses.stream(**options, text={"format": schema}) as stream:  # the SDK's own reader
        final = stream.get_final_response()
    assert final.output_text in ("true", "false") and final.status == "completed" and not final.incomplete_details
    held = client.responses.create(**options | {"max_output_tokens": 60}, text={"format": {"type": "json_object"}})
    assert held.output_text.lstrip().startswith("{")
    for change, says in (
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"tools": [{"type": "function", "name": "f", "parameters": {}, "strict": True}]}, "tools"),
        ({"input": []}, "input"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "only text"),
        ({"extra_body": {"inputs": 1}}, "did you mean input"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "json_schema needs a schema"),
        ({"text": {"fromat": {"type": "json_object"}}}, "did you mean format"),
    ):
        with pytest.raises(openai.BadRequestError, match=says):
            client.responses.create(**options | change)


def test_unknown_routes_and_the_description(served):
    for method, path, status, says in (
        ("POST", "/v1/completion", 404, "did you mean /v1/completions?"),
        ("GET", "/nowhere/at/all", 404, "no route"),
        ("GET", "/v1/completions", 405, "POST"),
        ("DELETE", "/v1/models", 405, "GET"),
    ):
        code, body = served.ask(method, path)
        error = json.loads(body)["error"]
        assert code == status and says in error["message"] and error["type"] == "invalid_request_error"
    status, page = served.ask("GET", "/docs")
    assert status == 200 and "POST /v1/responses" in page and "<code>temperature</code><td>number" in page
    assert "<script" not in page
    described = json.loads(served.ask("GET", "/openapi.json")[1])
    schemas = described["components"]["schemas"]
    for path in ("/v1/chat/completions", "/v1/completions", "/v1/responses"):
        assert path in described["paths"]
        ref = described["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        jsonschema.Draft202012Validator.check_schema(schemas[ref.rsplit("/", 1)[1]])
        assert served.ask("POST", path, "{}")[0] == 400
    for path in described["paths"]:
        assert served.ask("GET", path)[0] in (200, 405)
    fit = {"$ref": "#/components/schemas/ChatRequest", "components": described["components"]}
    jsonschema.validate({"messages": SAY, "n": 2}, fit)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"messages": SAY, "n": 0}, fit)


def test_a_full_queue_says_so(bundles):
    server = Served(bundles / "gguf", "--queue", 1)
    try:
        body = json.dumps({"prompt": "x", "max_tokens": 400, "temperature": 5, "stop": "\x00never"})
        with ThreadPoolExecutor(6) as pool:
            found = [s for s, _ in pool.map(lambda _: server.ask("POST", "/v1/completions", body), range(6))]
        assert found.count(503) >= 2 and set(found) <= {200, 503}
        assert server.ask("GET", "/health")[0] == 200
    finally:
        server.close()


def test_beyond_this_machine_a_token_is_wanted(bundles):
    done = run("phi-run", "serve", bundles / "gguf", "--host", "0.0.0.0", "--port", 0)
    assert done.returncode == 2 and "--token" in done.stderr
    server = Served(bundles / "gguf", "--token", "secret")
    try:
        with pytest.raises(openai.AuthenticationError):
            server.client("wrong").models.list()
        assert server.client("secret").models.list().data
        assert server.ask("POST", "/v1/completions", "{}")[0] == 401
        assert server.ask("GET", "/metrics")[0] == 401
        assert server.ask("GET", "/health")[0] == 200
    finally:
        server.close()


def test_memory_does_not_grow_with_requests(served):
    def rounds(n):
        for i in range(n):
            served.ask("POST", "/v1/completions", json.dumps({"prompt": f"def f{i}", "max_tokens": 4}))
        return served.metric("phi_resident_bytes")

    warm = rounds(60)
    assert rounds(200) <= 1.03 * warm
