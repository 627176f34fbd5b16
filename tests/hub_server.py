"""A server on loopback that speaks the part of the Hugging Face hub's protocol that downloads use."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
TOKEN = "hf_right"


class Hub:
    """repos: folders by name. gated: names that want TOKEN. breaks: how many answers end in the middle of the weights.
    asked: (method, path) of each request.
    """

    def __init__(self, repos: dict[str, Path], gated: tuple[str, ...] = ()) -> None:
        self.repos, self.gated, self.breaks = repos, gated, 0
        self.asked: list[tuple[str, str]] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_HEAD(self):
                hub.answer(self)

            def do_GET(self):
                hub.answer(self)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def answer(self, request):
        path = unquote(urlsplit(request.path).path).lstrip("/")
        self.asked.append((request.command, path))
        listing = path.startswith("api/models/")
        name = "/".join(path.removeprefix("api/models/").split("/")[:2])
        rest = path.removeprefix("api/models/").removeprefix(name).strip("/").split("/", 2)
        if name not in self.repos:
            return self._error(request, 404, "RepoNotFound", "Repository not found")
        if name in self.gated and not listing and request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._error(request, 403, "GatedRepo", "Access to this model is restricted")
        folder = self.repos[name]
        files = {p.relative_to(folder).as_posix(): p for p in sorted(folder.rglob("*")) if p.is_file()}
        if rest[0] in ("revision", "tree", "resolve") and len(rest) > 1 and rest[1] not in ("main", COMMIT):
            return self._error(request, 404, "RevisionNotFound", "Invalid rev id")
        if listing and rest[0] == "tree":
            tree = [{"type": "file", "path": n, "size": p.stat().st_size, "oid": _etag(p)} for n, p in files.items()]
            return self._send(request, 200, json.dumps(tree).encode(), {"Content-Type": "application/json"})
        if listing:
            said = {
                "_id": "0",
                "id": name,
                "modelId": name,
                "sha": COMMIT,
                "siblings": [{"rfilename": n} for n in files],
            }
            return self._send(request, 200, json.dumps(said).encode(), {"Content-Type": "application/json"})
        if rest[0] != "resolve" or len(rest) < 3 or rest[2] not in files:
            return self._error(request, 404, "EntryNotFound", "Entry not found")
        return self._file(request, files[rest[2]])

    def _file(self, request, path):
        content = path.read_bytes()
        headers = {"ETag": f'"{_etag(path)}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        status, start = 200, 0
        if given := request.headers.get("Range"):
            start = int(given.removeprefix("bytes=").split("-")[0])
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        body = content[start:]
        if self.breaks and path.suffix == ".safetensors" and request.command == "GET":
            self.breaks -= 1
            request.send_response(status)
            for key, value in (headers | {"Content-Length": str(len(body))}).items():
                request.send_header(key, value)
            request.end_headers()
            request.wfile.write(body[: len(body) // 2])
            request.wfile.flush()
            request.close_connection = True
            return
        self._send(request, status, body, headers)

    def _error(self, request, status, code, message):
        self._send(request, status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, request, status, body, headers):
        request.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            request.send_header(key, value)
        request.end_headers()
        if request.command == "GET":
            request.wfile.write(body)


def _etag(path):
    return hashlib.sha1(path.read_bytes()).hexdigest()
