"""The teacher's endpoint, against a server that does what servers do."""

import time

import pytest
from chat_server import Server, echo, reply

from phi_runtime.errors import PhiError, UsageError
from phi_train.teacher import endpoint as module
from phi_train.teacher.budget import Budget, Usage
from phi_train.teacher.cache import RequestCache
from phi_train.teacher.endpoint import Endpoint, Request, TeacherError


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "_LONGEST_WAIT", 0.05)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def serve():
    servers = []

    def started(script):
        servers.append(Server(script))
        return servers[-1]

    yield started
    for s in servers:
        s.server.shutdown()


def ask(server, cache, prompts, **options):
    with Endpoint(server.url, "m", cache, **options) as teacher:
        return [r.text if r.finish == "stop" else r for r in teacher.replies(Request(p, 50) for p in prompts)]


def test_replies_come_in_order_many_at_once_and_are_asked_for_once(serve, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")

    def slow(number, body):
        time.sleep(0.2 if body["messages"][0]["content"] == "p0" else 0.02)
        return echo(number, body)

    server = serve(slow)
    prompts = [f"p{n}" for n in range(40)]
    assert ask(server, tmp_path / "c", prompts) == [p[::-1] for p in prompts]
    assert 2 < server.most <= 8 and len(server.asked) == 40
    path, body = server.asked[0]
    assert path == "/v1/chat/completions" and body["max_tokens"] == 50 and body["model"] == "m"
    assert set(server.keys) == {"Bearer secret"}
    assert ask(server, tmp_path / "c", [*prompts, "new"]) == [p[::-1] for p in [*prompts, "new"]]
    assert len(server.asked) == 41
    assert "secret" not in (tmp_path / "c").read_text()


def test_a_refusal_for_now_is_tried_again(serve, tmp_path):
    def script(number, body):
        return (
            (429, b"slow down", ("Retry-After", "0"))
            if number < 3
            else (503, b"")
            if number == 3
            else echo(number, body)
        )

    server = serve(script)
    assert ask(server, tmp_path / "c", ["abc"]) == ["cba"]
    assert len(server.asked) == 4


def half(handler):
    handler.send_response(200)
    handler.send_header("Content-Length", "500")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')


def drip(handler):
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" ")
        time.sleep(0.05)


def flood(handler):
    handler.send_response(200)
    handler.end_headers()
    while True:
        handler.wfile.write(b" " * 65536)


def hang(handler):
    time.sleep(3)


def slow_status(handler):
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n" * 9:
        handler.wfile.write(bytes([byte]))
        time.sleep(0.05)


def go_on(handler):
    while True:
        handler.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.05)


def slow_refusal(handler):
    handler.send_response(500)
    handler.send_header("Content-Length", "4000")
    handler.end_headers()
    while True:
        handler.wfile.write(b"\x1b")
        time.sleep(0.05)


@pytest.mark.parametrize(
    "bad",
    [
        half, drip, flood, hang, slow_status, go_on,
        (200, b"<html>"), (200, b""), (200, b"\xff\xfe"), (200, b"[" * 100_000),
        (200, b'{"choices": []}'), reply(None), (200, b'{"choices": [{"message": {"content": "a\\ud800"}}]}'),
        (200, b'{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": -1}}'),
        (200, b'{"choices": [{"message": {"content": "a"}}], "usage": {"prompt_tokens": 1e999}}'),
        (200, b'{"choices": [{"message": {"content": "a"}}], "usage": 7}'),
    ],
)  # fmt: skip
def test_what_is_no_answer_is_asked_for_again_and_then_left(serve, tmp_path, bad):
    server = serve(lambda number, body: bad if body["messages"][0]["content"] == "bad" else echo(number, body))
    with Endpoint(server.url, "m", tmp_path / "c", attempts=2, seconds=0.5) as teacher:
        found = list(teacher.replies(Request(p, 50) for p in ("bad", "good")))
        assert found[0].finish == "failed" and found[0].text
        assert found[1].text == "doog"
        spent = teacher.budget.tokens
    assert sum(b["messages"][0]["content"] == "bad" for _, b in server.asked) == 2
    assert spent > 2 * 50  # what two lost answers may have cost counts
    with Endpoint(server.url, "m", tmp_path / "c") as teacher:
        assert teacher.budget.tokens == spent


@pytest.mark.parametrize("status", [401, 403, 404, 302])
def test_a_refusal_for_good_ends_the_work(serve, tmp_path, status):
    server = serve(
        lambda n, b: (status, b'{"error": {"message": "no such\\nmodel"}}', ("Location", "http://127.0.0.1:1/"))
    )
    with pytest.raises(TeacherError, match=rf"HTTP {status} \(no such model\); correct --teacher"):
        ask(server, tmp_path / "c", ["a", "b"])
    assert len(server.asked) <= 2


def test_a_refusal_of_one_request_is_not_tried_again(serve, tmp_path):
    server = serve(lambda n, b: (400, b"too long") if b["messages"][0]["content"] == "long" else echo(n, b))
    first, second = ask(server, tmp_path / "c", ["long", "abc"])
    assert (first.finish, first.text, second) == ("failed", "HTTP 400 (too long)", "cba") and len(server.asked) == 2


def test_an_endpoint_that_is_gone_is_given_up(tmp_path):
    with (
        Endpoint("http://127.0.0.1:9/v1", "m", tmp_path / "c", attempts=2) as teacher,
        pytest.raises(TeacherError, match=r"8 requests in a row had no reply .*goes on"),
    ):
        list(teacher.replies(Request(str(n), 5) for n in range(50)))
    with (
        Endpoint("http://127.0.0.1:9/v1", "m", tmp_path / "few", attempts=2) as teacher,
        pytest.raises(TeacherError, match=r"none of 3 requests had a reply \(.*refused\)"),
    ):
        list(teacher.replies(Request(str(n), 5) for n in range(3)))
    with Endpoint("http://127.0.0.1:9/v1", "m", tmp_path / "c") as teacher:
        assert teacher.budget.tokens == 0  # nothing was read
    for url in ("file:///etc/passwd", "127.0.0.1:8080", "http://"):
        with pytest.raises(UsageError, match="is no address"):
            Endpoint(url, "m", tmp_path / "d")


def test_a_budget_is_never_passed_and_holds_over_runs(serve, tmp_path):
    server = serve(lambda n, b: reply("x", (30, 50)))
    most = len("p00") + 64 + 50
    budget = Budget(tokens=80 * 10 + most)
    with pytest.raises(UsageError, match=r"budget of .* tokens does not hold another request"):
        ask(server, tmp_path / "c", [f"p{n:02d}" for n in range(40)], budget=budget)
    assert budget.tokens <= 80 * 10 + most
    asked = len(server.asked)
    assert asked == 11
    with pytest.raises(UsageError, match="the same command with a larger one goes on"):
        ask(server, tmp_path / "c", [f"p{n:02d}" for n in range(40)], budget=Budget(tokens=80 * asked + 10))
    assert len(server.asked) == asked
    money = Budget(dollars=1.0, prices=(1.0, 10.0))
    ask(server, tmp_path / "c", [f"p{n:02d}" for n in range(20)], budget=money)
    assert len(server.asked) == 20
    assert money.dollars == pytest.approx(20 * (30 + 500) / 1e6)
    with pytest.raises(UsageError, match="give --prices"):
        Budget(dollars=1.0)


def test_a_reply_without_usage_costs_the_most(serve, tmp_path):
    server = serve(lambda n, b: reply("x", None))
    budget = Budget()
    ask(server, tmp_path / "c", ["abc"], budget=budget)
    assert budget.tokens == 3 + 64 + 50


def test_a_reply_that_was_cut_off_says_so(serve, tmp_path):
    server = serve(lambda n, b: reply("x", finish="length"))
    for _ in range(2):
        (found,) = ask(server, tmp_path / "c", ["abc"])
        assert found.finish == "length"
    assert len(server.asked) == 1


def test_a_cache_is_of_one_model_and_one_run(tmp_path):
    with RequestCache(tmp_path / "c", "a") as cache:
        cache.put("x", 1)
        cache.put("y" * 1000, 2)
        with pytest.raises(PhiError, match="another run is writing it"):
            RequestCache(tmp_path / "c", "a")
    raw = (tmp_path / "c").read_bytes()
    (tmp_path / "c").write_bytes(raw[:-5])  # killed while it wrote
    with RequestCache(tmp_path / "c", "a") as cache:
        assert cache.get(1) == "x" and cache.get(2) is None and list(cache.values()) == ["x"]
        cache.put("z", 2)
    with RequestCache(tmp_path / "c", "a") as cache:
        assert list(cache.values()) == ["x", "z"]
    with pytest.raises(PhiError, match="was begun with another model"):
        RequestCache(tmp_path / "c", "b")
    with RequestCache(tmp_path / "c", "b", force=True) as cache:
        assert cache.get(1) is None


def test_settling_gives_back_what_was_reserved():
    budget = Budget(tokens=100, dollars=1, prices=(1, 1))
    budget.reserve(Usage(60, 40))
    with pytest.raises(UsageError):
        budget.reserve(Usage(1, 0))
    budget.settle(Usage(60, 40), Usage(10, 10))
    assert budget.tokens == 20 and budget.dollars == pytest.approx(20e-6)
    budget.reserve(Usage(40, 40))


def test_a_refusal_that_never_ends_is_cut(serve, tmp_path):
    server = serve(lambda number, body: slow_refusal)
    began = time.monotonic()
    with (
        Endpoint(server.url, "m", tmp_path / "c", attempts=1, seconds=0.5) as teacher,
        pytest.raises(TeacherError, match="HTTP 500") as e,
    ):
        list(teacher.replies([Request("a", 5)]))
    assert time.monotonic() - began < 3 and str(e.value).isprintable()


@pytest.mark.parametrize(
    "line", [5, {"text": 1}, {"text": "a", "finish": "stop", "usage": [1, 2, 3]},
             {"text": "a", "finish": "stop", "usage": [-1, 2]}, {"text": "a", "finish": "no", "usage": [1, 2]}],
)  # fmt: skip
def test_a_cache_of_something_else(tmp_path, line):
    with RequestCache(tmp_path / "c", "replies of m") as cache:
        cache.put(line, "k")
    with pytest.raises(UsageError, match="something else than replies"):
        Endpoint("http://127.0.0.1:1/v1", "m", tmp_path / "c")


@pytest.mark.parametrize(
    "url", ["http://[::1", "http://127.0.0.1:abc/v1", "http://127.0.0.1:99999/v1", "http://a b/v1", "ftp://a/v1", "a"]
)
def test_what_is_no_address(tmp_path, url):
    with pytest.raises(UsageError, match="is no address"):
        Endpoint(url, "m", tmp_path / "c")
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("dollars", "prices"),
    [(5.0, (float("nan"), 1.0)), (float("nan"), (1.0, 1.0)), (5.0, (-1.0, -1.0)), (-3.0, (1.0, 1.0)), (0.0, (1.0, 1.0)),
     (5.0, (float("inf"), 1.0))],
)  # fmt: skip
def test_a_budget_that_would_never_bite(dollars, prices):
    with pytest.raises(UsageError, match="dollars"):
        Budget(None, dollars, prices)
