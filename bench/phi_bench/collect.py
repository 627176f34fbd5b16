"""`phi-bench collect`: take in a phone's result, from a file or over HTTP with a code that is good once.

What comes is hostile until it is checked: the body is bounded, the record is strict, rows faster than their device's
memory are kept out and named, and a device that nobody knows goes into a folder of its own.
"""

import hmac
import io
import re
import secrets
import socket
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from phi_bench.devices import above_roof, find_device
from phi_bench.records import Benchmark, Failure, parse_benchmark
from phi_bench.results.write import write_benchmark
from phi_runtime.errors import BenchmarkError, OutputExistsError, UsageError

MOST_BYTES = 8 << 20
_TRIES = 5  # wrong codes before the door is shut


@dataclass(frozen=True)
class Taken:
    """A result that was kept: where, of which device, and what was kept out of it."""

    path: Path
    device: str
    known: bool
    kept_out: tuple[tuple[str, str], ...]


def take(raw: bytes, folder: Path, said: str) -> Taken:
    """Check a result and keep it in `folder`, or in `folder/unverified`. said: what to call it in errors.

    Raises BenchmarkError for what is no result of ours, OutputExistsError for one that is there.
    """
    if len(raw) > MOST_BYTES:
        raise BenchmarkError(f"{said}: has {len(raw):,} bytes, more than {MOST_BYTES:,}; it is no phone's result")
    b = parse_benchmark(raw, said)
    device = find_device(b.host)
    kept_out = above_roof(b, device) if device else []
    b = _without(b, dict(kept_out))
    name = (
        re.sub(r"[^A-Za-z0-9]+", "-", f"{b.host.device or b.host.cpu} {b.created}").strip("-").lower()[:100] or "result"
    )
    target = (folder if device else folder / "unverified") / f"{name}.json"
    if target.exists():
        raise OutputExistsError(f"{target}: this result is there already")
    target.parent.mkdir(parents=True, exist_ok=True)
    write_benchmark(target, b)
    return Taken(target, device.name if device else b.host.device or b.host.cpu, device is not None, tuple(kept_out))


def _without(b: Benchmark, wrong: dict[str, str]) -> Benchmark:
    """The same with rows that cannot be turned into failures."""
    rows = []
    for row in b.rows:
        if row.name in wrong:
            failure = Failure("bad output", f"above the roof: {wrong[row.name]}")
            runs = tuple(msgspec.structs.replace(r, phases=(), failure=failure) for r in row.runs)
            row = msgspec.structs.replace(row, runs=runs)
        rows.append(row)
    return msgspec.structs.replace(b, rows=tuple(rows))


def drawn(host: str, port: int, code: str) -> tuple[str, str]:
    """What the phone's camera reads, as a QR code for a terminal and as a link. For 0.0.0.0 the link names the address
    that this machine has in its network.
    """
    import segno

    link = f"phi-edge://collect?to={_reachable(host)}:{port}&code={code}"
    out = io.StringIO()
    segno.make(link, error="m", micro=False).terminal(out=out, compact=True)
    return out.getvalue(), link


def _reachable(host: str) -> str:
    if host != "0.0.0.0":  # noqa: S104
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        try:
            s.connect(("192.0.2.1", 9))  # sends nothing; the system chooses the address that it would send from
        except OSError:
            return "127.0.0.1"
        return str(s.getsockname()[0])


class Door:
    """One result, once, for who knows the code."""

    def __init__(self, folder: Path, code: str | None = None) -> None:
        self.folder = folder
        self.code = code or secrets.token_hex(4)
        self.taken: Taken | None = None
        self.wrong = 0
        self.shut: Callable[[], None] = lambda: None

    def app(self) -> Any:
        """The ASGI application: POST /result."""
        from starlette.applications import Starlette
        from starlette.requests import ClientDisconnect, Request
        from starlette.responses import JSONResponse
        from starlette.routing import Route

        def refuse(status: int, why: str) -> JSONResponse:
            return JSONResponse({"error": why}, status)

        async def result(request: Request) -> JSONResponse:
            given = request.headers.get("authorization", "").removeprefix("Bearer ")
            if self.taken is not None or self.wrong >= _TRIES:
                return refuse(410, "the code was used, or tried too often; start phi-bench collect again")
            if not hmac.compare_digest(given.encode(), self.code.encode()):
                self.wrong += 1
                if self.wrong >= _TRIES:
                    self.shut()
                return refuse(401, "the code is wrong")
            body = bytearray()
            try:
                async for piece in request.stream():
                    body += piece
                    if len(body) > MOST_BYTES:
                        return refuse(413, f"more than {MOST_BYTES:,} bytes")
            except ClientDisconnect:
                return refuse(400, "it broke off")
            try:
                self.taken = take(bytes(body), self.folder, "the result")
            except (BenchmarkError, OutputExistsError) as e:
                return refuse(422, str(e))
            self.shut()
            kept_out = [f"{row}: {why}" for row, why in self.taken.kept_out]
            return JSONResponse({"device": self.taken.device, "known": self.taken.known, "kept_out": kept_out})

        return Starlette(routes=[Route("/result", result, methods=["POST"])])

    def open(self, host: str, port: int) -> None:
        """Take the port and see that results can be kept. Raises UsageError."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
            self._socket = socket.create_server((host, port))
        except (OSError, OverflowError) as e:
            raise UsageError(f"cannot listen on {host}:{port} and write to {self.folder} ({e}); name others") from None

    def serve(self) -> None:
        """Wait for one result, on what was opened."""
        import uvicorn

        config = uvicorn.Config(self.app(), log_level="warning", limit_concurrency=8, timeout_keep_alive=5)
        server = uvicorn.Server(config)
        self.shut = lambda: setattr(server, "should_exit", True)
        server.run([self._socket])
