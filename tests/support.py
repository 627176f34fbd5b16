"""What several tests share."""

import http.client
import io
import re
import signal
import socket
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import import_module
from pathlib import Path

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sys.executable).parent

# A Phi-3 in every respect but size: head_dim 96, grouped queries, a window inside the context.
TINY = (
    "model.vocab_size=768",
    "model.hidden_size=192",
    "model.intermediate_size=256",
    "model.num_hidden_layers=2",
    "model.num_attention_heads=2",
    "model.num_key_value_heads=1",
    "model.max_position_embeddings=320",
    "model.sliding_window=100",
    "schedule.steps=150",
    "data.batch_size=8",
    "data.sequence_length=160",
    "optimizer.lr=4e-3",
    "schedule.warmup_steps=10",
    "save_every=50",
    "data.eval_windows=8",
    "initializer=published",  # the tests' bounds are of models that began so
)


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def settings(*extra: str) -> list[str]:
    """The tiny recipe's command-line settings."""
    return [part for setting in (*TINY, *extra) for part in ("--set", setting)]


def run(command: str, *args: object, **options: object) -> subprocess.CompletedProcess:
    """Run one of our commands as a user does."""
    return subprocess.run(
        [str(SCRIPTS / command), *map(str, args)], capture_output=True, text=True, check=False, **options
    )


def run_here(command: str, *args: object) -> subprocess.CompletedProcess:
    """As `run`, within this process: nothing is started and imported anew, which takes a second or two.

    For what a command says and refuses; what a process does to its surroundings needs `run`.
    """
    main = import_module(f"{command.replace('-', '_').replace('phi_run', 'phi_runtime')}.cli").main
    before, argv = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)], sys.argv
    out, err, code = io.StringIO(), io.StringIO(), 0
    sys.argv = [command, *map(str, args)]
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main()
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    finally:
        sys.argv = argv
        for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
            signal.signal(number, handler)
    return subprocess.CompletedProcess(sys.argv, code, out.getvalue(), err.getvalue())


def kill_all(process: subprocess.Popen) -> None:
    """Kill a process and all that it started, also what has a session of its own, and see them gone."""
    import psutil

    family = [process, *psutil.Process(process.pid).children(recursive=True)]
    for one in family:
        one.kill()
    for one in family:
        one.wait(20)


class Served:
    """A running `phi-run serve`; its port and its process."""

    def __init__(self, bundle, *options):
        self.process = subprocess.Popen(
            [SCRIPTS / "phi-run", "serve", bundle, "--port", "0", *map(str, options)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        line = self.process.stdout.readline()
        found = re.search(r"http://127\.0\.0\.1:(\d+)", line)
        assert found, line + self.process.stderr.read()
        self.port = int(found[1])

    def client(self, key="none"):
        import openai

        return openai.OpenAI(base_url=f"http://127.0.0.1:{self.port}/v1", api_key=key, max_retries=0, timeout=60)

    def ask(self, method, path, body=None, headers=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request(method, path, body, {"Content-Type": "application/json"} | (headers or {}))
        response = connection.getresponse()
        return response.status, response.read().decode()

    def metric(self, name):
        return int(re.search(rf"^{name} (\d+)", self.ask("GET", "/metrics")[1], re.MULTILINE)[1])

    def close(self):
        self.process.terminate()
        assert self.process.wait(20) in (0, 143, -15)


def feedback_noise(factor, relative, weights, random):
    """An error of weights [R, C] as error feedback leaves it, where rounding errs by `relative` of mean squares."""
    import numpy as np

    size = np.sqrt(relative * np.square(weights, dtype=np.float32).mean(axis=1, keepdims=True))
    drawn = random.standard_normal(weights.shape, dtype=np.float32) * size
    out = np.empty_like(drawn)
    for place, unit_upper in factor.places():
        out[:, factor.order[place]] = drawn[:, place] @ unit_upper
    return out


def assert_same_greedy(phi, prompt, ours, theirs, margin=0.05):
    """Two greedy answers to a prompt's tokens are the same, or part where two tokens are within `margin` nats: engines
    (and passes of other widths) round otherwise, and what is nearly equal may come out either way.
    """
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    if at is None:
        assert len(ours) == len(theirs)
        return
    logits = phi.logits([*prompt, *ours[:at]])[-1]
    assert abs(float(logits[ours[at]] - logits[theirs[at]])) < margin, (at, ours, theirs)


def any_scales(d):
    """Scales of a decoder's layers, drawn: those of a calibrated random model are nearly all zero."""
    import numpy as np

    from phi_export.calibrate.equalise import Scales, widths

    draw, scales = np.random.default_rng(0), []
    for layer in d.layers:
        parts = [draw.integers(-3, 4, n).astype(np.int8) for n in widths(d, layer)]
        keys, half = parts[3].reshape(d.kv_heads, d.head_dim), d.rope.dims // 2
        keys[:, half : 2 * half] = keys[:, :half]  # a rotated pair goes together
        scales.append(Scales(*parts))
    return scales
