"""A server on loopback that speaks the chat endpoint's protocol, or breaks it as a test says."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """Answers with what `script` gives for (number of the request, its body): a status and bytes, or a function."""

    def __init__(self, script):
        self.asked, self.keys, self.most = [], [], 0
        busy, lock, outer = [0], threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *args):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    busy[0] += 1
                    outer.most = max(outer.most, busy[0])
                    outer.asked.append((self.path, body))
                    outer.keys.append(self.headers.get("Authorization"))
                    number = len(outer.asked)
                try:
                    said = script(number, body)
                finally:
                    with lock:  # before it is answered: who has the answer may ask again at once
                        busy[0] -= 1
                if callable(said):
                    said(self)
                    self.close_connection = True
                    return
                status, raw, *headers = said
                self.send_response(status)
                for name, value in headers:
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(raw)))
                self.end_headers()
                self.wfile.write(raw)

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, *args):
                pass

        self.server = Quiet(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


def reply(text, usage=(5, 7), finish="stop"):
    answer = {"choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish}]}
    if usage:
        answer["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return 200, json.dumps(answer).encode()


def echo(number, body):
    return reply(body["messages"][0]["content"][::-1])
