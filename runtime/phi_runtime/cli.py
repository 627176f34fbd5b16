"""The commands' common frame, and `phi-run`."""

import argparse
import io
import os
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn, cast

from phi_runtime.backends.llama_cpp import KV_TYPES
from phi_runtime.errors import PhiError, missing_extra
from phi_runtime.generation.config import GenerationConfig, Options
from phi_runtime.generation.engine import POLICIES, Step
from phi_runtime.model import Phi, load
from phi_runtime.planning.memory import DEVICES
from phi_runtime.version import __version__

DEVICE_CHOICES = ("auto", "cpu", "gpu")
_IMPORT_PATIENCE = 200  # twentieths of a second that a signal waits for the end of an import


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a command: a PhiError becomes one line and its exit code, Ctrl-C and SIGTERM clean up.

    After a signal the exit code is the signal's, whatever error a library made of the exception that it raised.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)
        if not _imports(frame) or len(received) > _IMPORT_PATIENCE or not hasattr(signal, "setitimer"):
            raise KeyboardInterrupt
        # An exception that passes through a library's own initialisation aborts the process (torch 2.13), so this one
        # is raised a moment later.
        signal.signal(signal.SIGALRM, lambda _, frame: receive(number, frame))
        signal.setitimer(signal.ITIMER_REAL, 0.05)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, receive)
    for stream in (sys.stdout, sys.stderr):  # a console may lack characters that a model says
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    try:
        main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as e:
        _leave(e, received[0] if received else 0)
    sys.exit(0)


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported there."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def _leave(e: BaseException, signalled: int) -> NoReturn:
    """Say in one line why the command ends, and end it; an error of our own making stays a traceback."""
    if signalled:
        print("interrupted; nothing half-written was left behind", file=sys.stderr)
        sys.exit(128 + signalled)
    if isinstance(e, BrokenPipeError):
        sys.stderr.close()
        sys.exit(141)
    if isinstance(e, PhiError):
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of several processes, which all meet it, one says it
            print(f"error: {e}", file=sys.stderr)
        sys.exit(e.exit_code)
    if isinstance(e, MemoryError):
        print("error: not enough memory for this; close other programs or use a smaller model", file=sys.stderr)
        sys.exit(2)
    if isinstance(e, OSError):
        print(f"error: {e.filename or 'the system'}: {e.strerror or e}", file=sys.stderr)
        sys.exit(2)
    raise e


def parser(name: str, description: str) -> argparse.ArgumentParser:
    """A parser as all our commands have it."""
    p = argparse.ArgumentParser(name, description=description)
    p.add_argument("--version", action="version", version=f"{name} {__version__}")
    return p


def positive(text: str) -> int:
    """A whole number from 1 on, for argparse."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is less than 1")
    return value


def _port(text: str) -> int:
    if not 0 <= int(text) < 1 << 16:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 65535")
    return int(text)


def main() -> NoReturn:
    """Entry point of `phi-run`."""
    run(_main)


def _main(argv: list[str]) -> None:
    p = parser("phi-run", "Run a Phi: a bundle, a GGUF file, an onnxruntime-genai folder.")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")

    g = commands.add_parser("generate", help="continue a prompt")
    _model(g)
    g.add_argument("--prompt", required=True, help="the text to continue")
    _sampling(g)
    g.add_argument("--policy", default="reject", choices=POLICIES, help="if the context is too small (%(default)s)")
    g.add_argument("--quiet", action="store_true", help="do not print timings")

    c = commands.add_parser("chat", help="talk to a model in the terminal")
    _model(c)
    c.add_argument("--system", metavar="TEXT", help="system message")
    _sampling(c)

    q = commands.add_parser("plan", help="predict memory and speed before loading")
    q.add_argument("path", metavar="MODEL", help="a bundle, a GGUF file or an onnxruntime-genai folder")
    q.add_argument("--backend", help="engine to predict the speed of (default: the first of the format)")
    q.add_argument("--device", help="a named device instead of this machine: " + ", ".join(DEVICES))
    _memory(q)

    s = commands.add_parser("serve", help="answer the OpenAI API over HTTP, with a chat page at /")
    _model(s)
    s.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s); any other needs --token")
    s.add_argument("--port", type=_port, default=8080, help="port (%(default)s; 0 takes a free one)")
    s.add_argument("--token", help="API key that clients must send (default: PHI_RUN_TOKEN, if set)")
    s.add_argument("--queue", type=positive, default=16, help="requests that may wait; more get 503 (%(default)s)")
    s.add_argument("--timeout", type=positive, default=600, metavar="S", help="seconds per answer (%(default)s)")

    args = p.parse_args(argv)
    {"generate": _generate, "chat": _chat, "plan": _plan, "serve": _serve}[args.command](args)


def _model(p: argparse.ArgumentParser) -> None:
    p.add_argument("path", metavar="MODEL", help="a bundle, a GGUF file or an onnxruntime-genai folder")
    p.add_argument("--backend", help="engine to use (default: the first of the format)")
    p.add_argument("--device", choices=DEVICE_CHOICES, default="auto", help="where the engine runs (%(default)s)")
    p.add_argument("--threads", type=positive, help="threads (default: one per core)")
    p.add_argument("--chat-format", dest="chat", help="chat format, for a model whose chat template is not known")
    _memory(p)


def _memory(p: argparse.ArgumentParser) -> None:
    p.add_argument("--context", type=positive, metavar="N", help="tokens to reserve (default: the model's, up to 4096)")
    p.add_argument("--memory", metavar="SIZE", help="choose context and cache within this, such as 2.5GB")
    p.add_argument("--kv", help="type of the cache: int8 (ONNX, calibrated); of llama.cpp: " + ", ".join(KV_TYPES))


def _sampling(p: argparse.ArgumentParser) -> None:
    defaults = GenerationConfig()
    for name, says in _SAMPLING.items():
        default = getattr(defaults, name)
        kind = positive if name == "max_tokens" else type(default)
        p.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=f"{says} (default %(default)s)")


# Fields of `GenerationConfig` that are options.
_SAMPLING = {
    "max_tokens": "stop after this many tokens",
    "temperature": "0: always the likeliest token",
    "top_k": "sample from the k likeliest tokens; 0: all",
    "top_p": "sample from the likeliest tokens that add up to this probability",
    "min_p": "drop tokens below this share of the likeliest one's probability",
    "repetition_penalty": "above 1: discourage repetition",
    "seed": "seed of the sampler",
}


def _options(args: argparse.Namespace) -> Options:
    return cast(Options, {name: getattr(args, name) for name in _SAMPLING})


def _load(args: argparse.Namespace) -> Phi:
    return load(
        args.path, args.backend, args.context, args.memory, args.threads, args.kv, args.chat, device=args.device
    )


def _generate(args: argparse.Namespace) -> None:
    with _load(args) as phi:
        steps: list[Step] = []
        for piece in phi.stream(args.prompt, **(_options(args) | {"policy": args.policy})):
            print(piece.text if steps else args.prompt + piece.text, end="", flush=True)
            steps.append(piece.step)
        print()
        if not args.quiet:
            print(_timings(phi, steps), file=sys.stderr)


def _timings(phi: Phi, steps: list[Step]) -> str:
    later = sum(s.seconds for s in steps[1:])
    rate = f", then {(len(steps) - 1) / later:.1f} tokens/s" if later else ""
    dropped = sum(s.dropped for s in steps)
    lost = f"; {dropped} tokens dropped to fit the context" if dropped else ""
    return (
        f"[{phi.backend}: {len(steps)} tokens, first after {steps[0].seconds * 1000:.0f} ms{rate}; "
        f"stopped by {steps[-1].finish_reason}{lost}]"
    )


def _chat(args: argparse.Namespace) -> None:
    from phi_runtime.commands.terminal import converse

    with _load(args) as phi:
        converse(phi, args.system, _options(args))


def _plan(args: argparse.Namespace) -> None:
    from phi_runtime.planning.memory import plan

    found = plan(args.path, args.device, args.context, args.memory, args.kv, args.backend)
    print(f"{found.device}: context {found.context}, cache {found.kv}")
    print(found.arithmetic())
    if found.tokens_per_second is not None:
        print(f"about {found.tokens_per_second:.1f} tokens/s, by what phi-export calibrate-speed measured here")
    elif args.device is None:
        print("speed: not known; phi-export calibrate-speed measures what types take on this machine")


def _serve(args: argparse.Namespace) -> None:
    try:
        from phi_runtime.server.app import serve
    except ImportError as e:
        raise missing_extra(e, "server") from None
    token = args.token or os.environ.get("PHI_RUN_TOKEN")
    with _load(args) as phi:
        serve(phi, args.host, args.port, token, args.queue, args.timeout)
