"""The server application: routes, the request queue, streaming."""

import asyncio
import hmac
import ipaddress
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from importlib.resources import files
from typing import Any

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from phi_runtime.contract import nearest
from phi_runtime.errors import PhiError, UsageError
from phi_runtime.generation.config import Options
from phi_runtime.generation.sampler import log_probability, most_likely
from phi_runtime.model import Chunk, Phi
from phi_runtime.planning.memory import resident
from phi_runtime.server.grammar import Grammars
from phi_runtime.server.openapi import openapi, page
from phi_runtime.server.requests import ChatRequest, CompletionRequest, ResponsesRequest, TextRequest, parse, resolve
from phi_runtime.server.responses import Answered, Chat, Completion, Form, Score
from phi_runtime.server.responses_api import Responses
from phi_runtime.text.chat_templates import FORMATS
from phi_runtime.text.tools import OPEN
from phi_runtime.version import __version__

_MOST_BODY = 4_000_000  # bytes
# A prompt, and how to answer it.
_Wanted = tuple[list[int], Options]


class _RefusedError(Exception):
    """An answer of one line with a status of HTTP's."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class _Server:
    """One model, its queue and its counts."""

    def __init__(self, phi: Phi, token: str | None, queue: int, timeout: float) -> None:
        self.phi, self.token, self.queue, self.timeout = phi, token, queue, timeout
        self.name = phi.package.path.parent.name if phi.package.folder is not None else phi.package.path.stem
        self.grammars = Grammars(phi.package)
        self.began = time.time()
        self.inside = 0  # requests that were let in and are not answered
        self.counts = {"requests": 0, "refused": 0, "cancelled": 0, "prompt_tokens": 0, "generated_tokens": 0}

    async def chat(self, request: Request) -> Response:
        body = parse(await self._body(request), ChatRequest)
        asked = resolve(body)
        chat = self.phi.chat_format
        if body.with_tools and chat is not None and "tool" not in chat.roles:
            known = ", ".join(f.name for f in FORMATS.values() if "tool" in f.roles)
            raise UsageError(f"tools: the chat format {chat.name} has no place for them, only {known}; leave them out")
        prompt = self.phi.chat_prompt(body.conversation())
        if asked.called:
            prompt += self.phi.tokenize(OPEN)
        return await self._answer(request, asked, [prompt], Chat(self.name, asked))

    async def complete(self, request: Request) -> Response:
        body = parse(await self._body(request), TextRequest)
        asked = resolve(body)
        prompts = [self.phi.tokenize(p) if isinstance(p, str) else p for p in body.prompts()]
        return await self._answer(request, asked, prompts, Completion(self.name, asked))

    async def respond(self, request: Request) -> Response:
        body = parse(await self._body(request), ResponsesRequest)
        chat = body.as_chat()
        asked = resolve(chat)
        prompt = self.phi.chat_prompt(chat.conversation())
        return await self._answer(request, asked, [prompt], Responses(self.name, asked, body))

    async def models(self, request: Request) -> Response:
        self._check(request)
        one = {"id": self.name, "object": "model", "created": int(self.began), "owned_by": "phi-edge"}
        return JSONResponse({"object": "list", "data": [one]})

    async def health(self, request: Request) -> Response:
        return JSONResponse({"status": "ok", "model": self.name, "version": __version__, "waiting": self.inside})

    async def metrics(self, request: Request) -> Response:
        self._check(request)
        values = {f"phi_{name}_total": value for name, value in self.counts.items()}
        values |= {"phi_requests_inside": self.inside, "phi_resident_bytes": resident()}
        lines = [
            f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}\n{name} {value}\n"
            for name, value in values.items()
        ]
        return PlainTextResponse("".join(lines), media_type="text/plain; version=0.0.4")

    async def page(self, request: Request) -> Response:
        text = files("phi_runtime.server").joinpath("page.html").read_text(encoding="utf-8")
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'"
        headers = {"Content-Security-Policy": f"{policy}; img-src data:; frame-ancestors 'none'; base-uri 'none'"}
        return HTMLResponse(text, headers=headers)

    def _check(self, request: Request) -> None:
        if self.token is None:
            return
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.token.encode()):
            raise _RefusedError(401, "the API key is missing or wrong; send the server's --token as the key")

    async def _body(self, request: Request) -> bytes:
        self._check(request)
        if request.headers.get("content-type", "").split(";")[0].strip() != "application/json":
            raise _RefusedError(415, "send the body as application/json")
        raw = b""
        async for part in request.stream():
            raw += part
            if len(raw) > _MOST_BODY:
                raise _RefusedError(413, f"the body is larger than {_MOST_BODY} bytes")
        return raw

    async def _answer(
        self, request: Request, asked: CompletionRequest, prompts: list[list[int]], form: Form
    ) -> Response:
        for tokens in prompts:
            self.phi.engine.fits(tokens, asked.options["policy"])
        if asked.constrained:
            self.grammars.json(asked.schema)  # refused before anything is sent
        if self.inside > self.queue:
            self.counts["refused"] += 1
            raise _RefusedError(503, f"{self.inside} requests are waiting already; try again later")
        self.counts["requests"] += 1
        self.counts["prompt_tokens"] += sum(map(len, prompts))
        self.inside += 1
        wanted = [(tokens, self._options(asked, tokens, i)) for tokens in prompts for i in range(asked.choices)]
        if asked.stream:
            return _Stream(self._events(asked, wanted, form), self._leave)
        generating = asyncio.ensure_future(self._collect(asked, wanted))
        leaving = asyncio.ensure_future(_gone(request))
        try:
            await asyncio.wait({generating, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if not generating.done():
                raise ClientDisconnect
            return JSONResponse(form.whole(generating.result(), self.phi))
        finally:
            generating.cancel()
            leaving.cancel()
            try:
                await asyncio.wait({generating})  # ends within one token
            finally:
                self._leave()

    def _options(self, asked: CompletionRequest, tokens: list[int], choice: int) -> Options:
        """Of one of the answers to a prompt."""
        room = max(1, self.phi.engine.backend.context - len(tokens))
        options = asked.options.copy()
        options["seed"] = asked.options["seed"] + choice
        options["max_tokens"] = room if asked.max_tokens is None else asked.max_tokens
        if asked.constrained:
            options["constraint"] = self.grammars.json(asked.schema)
        return options

    def _leave(self) -> None:
        self.inside -= 1

    async def _collect(self, asked: CompletionRequest, wanted: list[_Wanted]) -> list[Answered]:
        answers = []
        for tokens, options in wanted:
            pieces = [piece async for piece in self._pieces(tokens, options)] if options["max_tokens"] else []
            echoed = self.phi.detokenize(tokens) if asked.echo else ""
            scores = None
            if asked.echo and asked.logprobs:
                scores = await asyncio.to_thread(self._scores, tokens, options.get("top_logprobs", 0))
            answers.append(Answered(tokens, echoed, pieces, scores))
        return answers

    def _scores(self, tokens: list[int], top: int) -> list[Score]:
        """How likely each token of a prompt was after those before it."""
        rows = self.phi.logits(tokens)
        return [(None, ())] + [
            (log_probability(row, token), most_likely(row, top) if top else ())
            for row, token in zip(rows, tokens[1:], strict=False)
        ]

    async def _pieces(self, tokens: list[int], options: Options) -> AsyncGenerator[Chunk, None]:
        """The model's steps, counted, within the time that an answer may take."""
        ended = False
        try:
            async with asyncio.timeout(self.timeout), aclosing(self.phi.astream(tokens, **options)) as pieces:
                async for piece in pieces:
                    self.counts["generated_tokens"] += 1
                    ended = piece.step.finish_reason is not None
                    yield piece
        except TimeoutError:
            raise _RefusedError(504, f"the answer took more than {self.timeout:g} s; ask for fewer tokens") from None
        finally:
            self.counts["cancelled"] += not ended

    async def _events(self, asked: CompletionRequest, wanted: list[_Wanted], form: Form) -> AsyncGenerator[str, None]:
        for data in form.first():
            yield form.frame(data)
        said: list[Chunk] = []
        try:
            for index, (tokens, options) in enumerate(wanted):
                async with aclosing(self._pieces(tokens, options)) as pieces:
                    async for piece in pieces:
                        said.append(piece)
                        yield form.frame(form.part(piece, self.phi, index))
        except (PhiError, _RefusedError) as e:
            yield form.frame(_error(str(e), "server_error"))
            return
        for data in form.last(said, sum(len(tokens) for tokens, _ in wanted[:: asked.choices])):
            yield form.frame(data)
        if form.closing:
            yield form.closing


class _Stream(StreamingResponse):
    """Events, and a word when they are over, however that came."""

    def __init__(self, events: AsyncGenerator[str, None], over: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"Cache-Control": "no-store"})
        self._generator, self._over = events, over

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            try:
                await self._generator.aclose()  # a client that left during `send` leaves it suspended, with the engine
            finally:
                self._over()


def _error(message: str, kind: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


async def _gone(request: Request) -> None:
    """Returns when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def app(phi: Phi, token: str | None = None, queue: int = 16, timeout: float = 600, anywhere: bool = False) -> Starlette:
    """The ASGI application over a loaded model.

    queue: requests that may wait while one is answered. anywhere: whether requests may name any host; otherwise only
    this machine's own names, so that a foreign page cannot reach the server through a name of its own.
    """
    server = _Server(phi, token, queue, timeout)

    def refused(status: int) -> Callable[[Request, Exception], Awaitable[Response]]:
        async def handler(request: Request, e: Exception) -> Response:
            code = e.status if isinstance(e, _RefusedError) else status
            kind = "invalid_request_error" if code < 500 else "server_error"
            headers = {"Retry-After": "1"} if code == 503 else {}
            return JSONResponse(_error(str(e), kind), code, headers=headers)

        return handler

    async def left(request: Request, e: Exception) -> Response:
        return Response(status_code=499)  # nobody reads it

    async def unknown(request: Request, e: Exception) -> Response:
        paths = [route.path for route in request.app.routes]
        hint = nearest(request.url.path, paths) or f"; there are {', '.join(paths)}"
        return JSONResponse(_error(f"no route {request.url.path}{hint}", "invalid_request_error"), 404)

    async def method(request: Request, e: Exception) -> Response:
        allowed = (getattr(e, "headers", None) or {}).get("Allow", "")
        message = f"{request.url.path}: {request.method} is not what it takes, which is {allowed}"
        return JSONResponse(_error(message, "invalid_request_error"), 405, headers={"Allow": allowed})

    async def describe(request: Request) -> Response:
        return JSONResponse(openapi(server.name))

    async def described(request: Request) -> Response:
        headers = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
        return HTMLResponse(page(openapi(server.name)), headers=headers)

    hosts = ["*"] if anywhere else ["localhost", "127.0.0.1", "[::1]"]
    return Starlette(
        routes=[
            Route("/", server.page),
            Route("/health", server.health),
            Route("/metrics", server.metrics),
            Route("/v1/models", server.models),
            Route("/v1/chat/completions", server.chat, methods=["POST"]),
            Route("/v1/completions", server.complete, methods=["POST"]),
            Route("/v1/responses", server.respond, methods=["POST"]),
            Route("/openapi.json", describe),
            Route("/docs", described),
        ],
        middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
        exception_handlers={
            PhiError: refused(400),
            _RefusedError: refused(400),
            ClientDisconnect: left,
            404: unknown,
            405: method,
        },
    )


def serve(phi: Phi, host: str, port: int, token: str | None, queue: int, timeout: float) -> None:
    """Completion until Ctrl-C or SIGTERM. Raises UsageError for a host beyond this machine without a token."""
    import uvicorn

    if not _loopback(host) and not token:
        raise UsageError(f"--host {host}: is reachable from outside; give --token (or PHI_RUN_TOKEN) as well")
    config = uvicorn.Config(
        app(phi, token, queue, timeout, anywhere=not _loopback(host)),
        host=host,
        port=port,
        log_level="warning",
        timeout_keep_alive=30,
        limit_concurrency=4 * queue + 64,
        h11_max_incomplete_event_size=1 << 16,
        server_header=False,
    )
    listener = config.bind_socket()
    listener.listen(128)  # so that who reads the address below can connect
    shown = f"[{host}]" if ":" in host else host
    print(f"serving {phi.package.path.name} at http://{shown}:{listener.getsockname()[1]}", flush=True)
    uvicorn.Server(config).run(sockets=[listener])


def _loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
