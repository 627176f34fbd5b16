"""A model behind an OpenAI-compatible endpoint, asked many things at once, within a budget."""

import http.client
import json
import os
import socket
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from types import TracebackType
from typing import Annotated, Any, Literal, Self

import msgspec

from phi_runtime.contract import StrictContract, convert
from phi_runtime.errors import PhiError, UsageError
from phi_train.teacher.budget import Budget, Usage
from phi_train.teacher.cache import RequestCache

_MOST_BYTES = 16 << 20  # of an answer
_FATAL = (401, 402, 403, 404, 405)  # and redirections: no request would fare better
_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504, 529)
_LONGEST_WAIT = 60.0  # seconds between two attempts
_Tokens = Annotated[int, msgspec.Meta(ge=0, lt=1 << 40)]
_FAILURES = 8  # requests in a row, after which the endpoint is given up


class TeacherError(PhiError):
    """An endpoint that cannot be reached, refuses, or has answered nothing of use many times in a row."""


@dataclass(frozen=True)
class Request:
    """What a teacher is asked: one message of a user."""

    prompt: str
    max_tokens: int
    temperature: float = 1.0
    seed: int = 0


@dataclass(frozen=True)
class Reply:
    """What it said. finish: "failed" where nothing of use came after all attempts; `text` then says why."""

    text: str
    finish: Literal["stop", "length", "failed"] = "stop"


class Endpoint:
    """`url` is that which ends in /v1. key: by default of the variable OPENAI_API_KEY, none where that is not set.

    Replies are kept in the file `cache` and never asked for twice. seconds: for one attempt, whatever arrives in it.
    Closed by `close` or `with`. Raises UsageError for a url that is none.
    """

    def __init__(
        self,
        url: str,
        model: str,
        cache: Path,
        budget: Budget | None = None,
        at_once: int = 8,
        attempts: int = 6,
        seconds: float = 300.0,
        key: str | None = None,
    ) -> None:
        if not _is_address(url):
            raise UsageError(f"--teacher {url}: is no address; give such as http://127.0.0.1:8080/v1")
        self.name = model
        self.budget = budget or Budget()
        self._url = url.rstrip("/") + "/chat/completions"
        self._key = os.environ.get("OPENAI_API_KEY", "") if key is None else key
        self._at_once, self._attempts, self._seconds = at_once, attempts, seconds
        self._cache = RequestCache(cache, f"replies of {model}")
        self._lock = threading.Condition()
        self._asking = 0  # attempts under way
        self._failures = 0  # requests in a row
        self._stopped = threading.Event()
        self.cached = 0
        try:
            for kept in self._cache.values():
                self.budget.spend(_checked(kept, cache)[1])
        except UsageError:
            self._cache.close()
            raise

    def replies(self, requests: Iterable[Request]) -> Iterator[Reply]:
        """In the order of the requests. Raises TeacherError, and UsageError where the budget is spent."""
        tasks: Queue[tuple[Request, Future[Reply]] | None] = Queue()
        for _ in range(self._at_once):  # they end with the process, whatever an endpoint does
            threading.Thread(target=self._work, args=(tasks,), daemon=True).start()
        waiting: deque[Future[Reply]] = deque()
        asked, failed = 0, 0

        def taken() -> Reply:
            nonlocal failed
            reply = waiting.popleft().result()
            failed += reply.finish == "failed"
            if failed == asked and not waiting:
                raise TeacherError(f"{self._url}: none of {asked} requests had a reply ({reply.text})")
            return reply

        try:
            for request in requests:
                future: Future[Reply] = Future()
                waiting.append(future)
                tasks.put((request, future))
                asked += 1
                while len(waiting) > 2 * self._at_once:
                    yield taken()
            while waiting:
                yield taken()
        finally:
            if waiting:
                self._stopped.set()
            for _ in range(self._at_once):
                tasks.put(None)

    def _work(self, tasks: "Queue[tuple[Request, Future[Reply]] | None]") -> None:
        while (task := tasks.get()) is not None:
            request, future = task
            try:
                future.set_result(self._reply(request))
            except BaseException as e:
                future.set_exception(e)

    def _reply(self, request: Request) -> Reply:
        body = {
            "model": self.name,
            "messages": [{"role": "user", "content": request.prompt}],
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
        }
        with self._lock:
            kept = self._cache.get(body)
            if kept is not None:
                self.cached += 1
                return _checked(kept, self._cache.path)[0]
        raw, most = json.dumps(body).encode(), Usage(len(request.prompt.encode()) + 64, request.max_tokens)
        why = ""
        for attempt in range(self._attempts):
            if self._stopped.is_set():
                raise TeacherError(f"{self._url}: the work was ended")
            self._reserve(most)
            used: Usage | None = None
            try:
                text, finish, used = _understood(self._post(raw), most)
            except _RefusedError as e:
                used, why = Usage(0, 0), str(e)
                if e.status in _FATAL or e.status < 400:
                    raise TeacherError(f"{self._url}: {e}; correct --teacher, --model or the key") from None
                if e.status not in _RETRIED:
                    break  # of this request alone, such as a prompt that is too long
                self._wait(attempt, e.seconds)
            except (OSError, http.client.HTTPException, ValueError) as e:
                used = Usage(0, 0) if isinstance(e, ConnectionRefusedError) else most  # what it cost is not known
                why = str(e) or type(e).__name__
                self._wait(attempt)
            else:
                reply = {"text": text, "finish": finish, "usage": [used.prompt, used.completion]}
                with self._lock:
                    self._failures = 0
                    self._cache.put(reply, body)
                return Reply(text, finish)
            finally:
                with self._lock:
                    self.budget.settle(most, used or most)
                    self._asking -= 1
                    self._lock.notify_all()
                    if used is most:  # nobody said
                        kept = {"text": "", "finish": "failed", "usage": [most.prompt, most.completion]}
                        self._cache.put(kept, "unknown", uuid.uuid4().hex)
        with self._lock:
            self._failures += 1
            if self._failures >= _FAILURES:
                raise TeacherError(
                    f"{self._url}: {self._failures} requests in a row had no reply ({why}); replies so far are kept "
                    "in the cache, and the same command goes on"
                )
        return Reply(" ".join(why.split())[:200], "failed")

    def _wait(self, attempt: int, least: float = 0.0) -> None:
        """Before the next attempt, if there is one."""
        if attempt + 1 < self._attempts:
            self._stopped.wait(min(_LONGEST_WAIT, max(least, 0.5 * 2**attempt)))

    def _reserve(self, most: Usage) -> None:
        """What is reserved beside it may turn out to be less: only when nothing is under way is a budget spent."""
        with self._lock:
            while True:
                try:
                    self.budget.reserve(most)
                    break
                except UsageError:
                    if not self._asking:
                        raise
                    self._lock.wait()
            self._asking += 1

    def _post(self, raw: bytes) -> bytes:
        """One attempt's answer. Raises _RefusedError, OSError, HTTPException, ValueError for one that is too long."""
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        end = time.monotonic() + self._seconds
        request = urllib.request.Request(self._url, raw, headers)  # noqa: S310, its scheme was checked
        try:
            with _deadline(self._seconds) as opener:
                return self._answer(opener, request, end)
        except (OSError, http.client.HTTPException, ValueError):
            if time.monotonic() > end:
                raise TimeoutError("its answer did not end in time") from None
            raise

    def _answer(self, opener: urllib.request.OpenerDirector, request: urllib.request.Request, end: float) -> bytes:
        try:
            with opener.open(request, timeout=self._seconds) as response:
                return _read(response, end)
        except urllib.error.HTTPError as e:
            with e:
                said = _error(e.read(4096))
            wait = e.headers.get("Retry-After", "")
            seconds = float(wait) if wait.isascii() and wait.isdigit() else 0.0
            raise _RefusedError(f"HTTP {e.code}{said}", e.code, seconds) from None
        except urllib.error.URLError as e:
            raise e.reason if isinstance(e.reason, OSError) else OSError(str(e.reason)) from None

    def close(self) -> None:
        """Close the cache; it stays."""
        self._stopped.set()
        with self._lock:
            self._cache.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None) -> None:
        self.close()


class _RefusedError(Exception):
    def __init__(self, said: str, status: int, seconds: float) -> None:
        super().__init__(said)
        self.status, self.seconds = status, seconds


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirection would take the key elsewhere."""

    def redirect_request(self, *_: Any) -> None:
        return None


@contextmanager
def _deadline(seconds: float) -> Iterator[urllib.request.OpenerDirector]:
    """An opener whose connections are shut after so many seconds, however slowly something arrives."""
    sockets: list[socket.socket] = []

    def shut() -> None:
        for s in sockets:
            with suppress(OSError):
                s.shutdown(socket.SHUT_RDWR)

    class Connection(http.client.HTTPConnection):
        def connect(self) -> None:
            super().connect()
            sockets.append(self.sock)

    class SecureConnection(http.client.HTTPSConnection):
        def connect(self) -> None:
            super().connect()
            sockets.append(self.sock)

    class Http(urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(Connection, req)

    class Https(urllib.request.HTTPSHandler):
        def https_open(self, req: urllib.request.Request) -> Any:
            return self.do_open(SecureConnection, req)

    timer = threading.Timer(seconds, shut)
    timer.daemon = True
    timer.start()
    try:
        yield urllib.request.build_opener(_NoRedirect, Http, Https)
    finally:
        timer.cancel()


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port
    except ValueError:
        return False
    plain = url.isascii() and url.isprintable() and " " not in url
    return plain and parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0


class _Kept(StrictContract, frozen=True):
    """A line of the cache."""

    text: str
    finish: Literal["stop", "length", "failed"]
    usage: tuple[_Tokens, _Tokens]


def _checked(kept: object, cache: Path) -> tuple[Reply, Usage]:
    try:
        found = convert(kept, _Kept)
    except ValueError as e:
        raise UsageError(f"{cache}: holds something else than replies ({e}); remove it") from None
    return Reply(found.text, found.finish), Usage(*found.usage)


def _read(response: Any, end: float) -> bytes:
    parts, size = [], 0
    read: Callable[[int], bytes] = response.read1
    while part := read(1 << 16):
        size += len(part)
        if size > _MOST_BYTES:
            raise ValueError(f"its answer is longer than {_MOST_BYTES:,} bytes")
        if time.monotonic() > end:
            raise TimeoutError("its answer did not end in time")
        parts.append(part)
    wanted = response.headers.get("Content-Length", "")
    if wanted.isascii() and wanted.isdigit() and size < int(wanted):
        raise ValueError(f"half an answer: {size:,} of {int(wanted):,} bytes")
    return b"".join(parts)


def _understood(raw: bytes, most: Usage) -> tuple[str, Literal["stop", "length"], Usage]:
    """Text, why it ended, what it cost. Raises ValueError."""
    try:
        answer = json.loads(raw)
        choice = answer["choices"][0]
        text = choice["message"]["content"]
        finish = choice.get("finish_reason")
        usage = answer.get("usage") or {}
        used = Usage(usage.get("prompt_tokens", most.prompt), usage.get("completion_tokens", most.completion))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"its answer is no chat completion: {raw[:80]!r}") from None
    numbers = (used.prompt, used.completion)
    if not isinstance(text, str) or not all(type(n) is int and 0 <= n < 1 << 40 for n in numbers):
        raise ValueError("its answer has no text, or a usage that is none")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("its answer has half a character") from None
    return text, "length" if finish == "length" else "stop", used


def _error(raw: bytes) -> str:
    """What a refusal says, in brackets."""
    try:
        said = json.loads(raw)["error"]
        said = said["message"] if isinstance(said, dict) else said
    except (ValueError, KeyError, TypeError, RecursionError):
        said = raw.decode(errors="replace")
    said = "".join(c if c.isprintable() else " " for c in str(said))
    said = " ".join(said.split())[:200]
    return f" ({said})" if said else ""
