"""The commands' common frame, and `phi-run`."""

import argparse
import signal
import sys
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

from phi_runtime import __version__
from phi_runtime.errors import PhiError


def run(main: Callable[[list[str]], None]) -> NoReturn:
    """Run a command: a PhiError becomes one line and its exit code, Ctrl-C and SIGTERM clean up.

    After a signal the exit code is the signal's, whatever error a library made of the exception that it raised.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> NoReturn:
        received.append(number)
        raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, receive)
    try:
        main(sys.argv[1:])
    except (Exception, KeyboardInterrupt) as e:
        _leave(e, received[0] if received else 0)
    sys.exit(0)


def _leave(e: BaseException, signalled: int) -> NoReturn:
    """Say in one line why the command ends, and end it; an error of our own making stays a traceback."""
    if signalled:
        print("interrupted; nothing half-written was left behind", file=sys.stderr)
        sys.exit(128 + signalled)
    if isinstance(e, BrokenPipeError):
        sys.stderr.close()
        sys.exit(141)
    if isinstance(e, PhiError):
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


def main() -> NoReturn:
    """Entry point of `phi-run`."""
    run(_main)


def _main(argv: list[str]) -> None:
    p = parser("phi-run", "Run a Phi bundle.")
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    g = commands.add_parser("generate", help="continue a prompt")
    g.add_argument("bundle", metavar="BUNDLE", help="folder of a bundle that phi-export wrote")
    g.add_argument("--prompt", required=True, help="the text to continue")
    g.add_argument(
        "--max-tokens", type=positive, default=256, metavar="N", help="at most N tokens (default %(default)s)"
    )
    g.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token (default)")
    g.add_argument("--top-k", type=int, default=0, help="draw from the k likeliest tokens (default 0: all)")
    g.add_argument("--top-p", type=float, default=1.0, help="draw from the likeliest tokens of this share (default 1)")
    g.add_argument("--seed", type=int, default=0, help="seed of the draw (default 0)")
    g.add_argument("--backend", help="engine to use (default: the first of the format)")
    g.add_argument("--threads", type=positive, help="threads (default: one per core)")
    g.add_argument("--quiet", action="store_true", help="no timings after the text")
    args = p.parse_args(argv)
    _generate(args)


def _generate(args: argparse.Namespace) -> None:
    from phi_runtime.model import load

    with load(args.bundle, backend=args.backend, threads=args.threads) as phi:
        steps = []
        print(args.prompt, end="", flush=True)
        for piece in phi.stream(args.prompt, args.max_tokens, args.temperature, args.top_k, args.top_p, args.seed):
            print(piece.text, end="", flush=True)
            steps.append(piece.step)
        print()
        if steps and not args.quiet:
            later = sum(s.seconds for s in steps[1:])
            rate = f", then {(len(steps) - 1) / later:.1f} tokens/s" if later else ""
            print(
                f"[{phi.backend}: {len(steps)} tokens, first after {steps[0].seconds * 1000:.0f} ms{rate}; "
                f"stopped by {steps[-1].stop}]",
                file=sys.stderr,
            )
