"""Hours of clients at a server: errors, latency and memory.

    phi-run serve MODEL --port 8080 &
    phi-bench suite load http://127.0.0.1:8080 --minutes 60 --clients 8

Each client asks, one request after the other, for a chat whole, a chat streamed, a completion with a stop, an answer to
a JSON schema, and every tenth time leaves in the middle of a stream. Latencies are of the whole requests of the first
kind.
"""

import argparse
import json
import re
import statistics
import threading
import time
import urllib.request
from collections import Counter
from typing import Any

import openai

_SCHEMA = {
    "type": "object",
    "properties": {"n": {"enum": [1, 2, 3]}, "s": {"type": "string", "maxLength": 8}},
    "required": ["n", "s"],
    "additionalProperties": False,
}


class Load:
    """What all clients counted."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.done: Counter[str] = Counter()
        self.errors: list[str] = []
        self.seconds: list[float] = []
        self.over = False

    def client(self, number: int) -> None:
        """Ask until it is over."""
        client = openai.OpenAI(base_url=f"{self.address}/v1", api_key="none", max_retries=0, timeout=300)
        turn = number
        while not self.over:
            turn += 1
            try:
                self._ask(client, turn)
            except Exception as e:
                self.errors.append(f"{type(e).__name__}: {e}")

    def _ask(self, client: Any, turn: int) -> None:
        said = [{"role": "user", "content": f"def f{turn % 50}(x):"}]
        common = {"model": "phi", "max_tokens": 24, "temperature": 0.0}
        kind = "left" if turn % 10 == 0 else ("chat", "stream", "stop", "schema")[turn % 4]
        if kind == "chat":
            began = time.perf_counter()
            client.chat.completions.create(messages=said, **common)
            self.seconds.append(time.perf_counter() - began)
        elif kind in ("stream", "left"):
            with client.chat.completions.create(messages=said, stream=True, **common) as parts:
                for i, _ in enumerate(parts):
                    if kind == "left" and i == 4:
                        break
        elif kind == "stop":
            client.completions.create(prompt="def f(x):\n", stop=["\n\n", "return"], **common)
        else:
            form = {"type": "json_schema", "json_schema": {"name": "x", "schema": _SCHEMA}}
            options = common | {"max_tokens": 100, "temperature": 1.0, "seed": turn}
            text = client.chat.completions.create(messages=said, response_format=form, **options)
            json.loads(text.choices[0].message.content)
        self.done[kind] += 1

    def resident(self) -> int:
        """The server's memory, bytes."""
        with urllib.request.urlopen(f"{self.address}/metrics") as answer:  # noqa: S310  (the address is the caller's)
            found = re.search(rb"^phi_resident_bytes (\d+)", answer.read(), re.MULTILINE)
        assert found is not None
        return int(found[1])


def main(argv: list[str]) -> None:
    """Run the clients, print each minute, sum up."""
    p = argparse.ArgumentParser("phi-bench suite load", description=(__doc__ or "").splitlines()[0])
    p.add_argument("address")
    p.add_argument("--minutes", type=float, default=60)
    p.add_argument("--clients", type=int, default=8)
    args = p.parse_args(argv)
    load = Load(args.address)
    threads = [threading.Thread(target=load.client, args=(i,), daemon=True) for i in range(args.clients)]
    began = time.time()
    for thread in threads:
        thread.start()
    warm = None
    while time.time() - began < 60 * args.minutes:
        time.sleep(min(60, 60 * args.minutes / 10))
        now = load.resident()
        if warm is None and time.time() - began > 60 * args.minutes / 10:
            warm = now
        print(f"{time.time() - began:6.0f} s  {dict(load.done)}  {len(load.errors)} errors  {now:,} bytes", flush=True)
    load.over = True
    for thread in threads:
        thread.join()
    now = load.resident()
    ordered = sorted(load.seconds)
    p50, p99 = statistics.median(ordered), ordered[int(0.99 * len(ordered))]
    print(f"{sum(load.done.values())} requests, {len(load.errors)} errors {Counter(load.errors).most_common(3)}")
    print(f"p50 {p50:.3f} s, p99 {p99:.3f} s ({p99 / p50:.2f}x)")
    print(f"memory {now:,} bytes, {100 * (now / (warm or now) - 1):+.2f} % since warm")
