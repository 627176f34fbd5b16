"""`phi-run chat`: a conversation in the terminal."""

import signal
import sys
from contextlib import closing
from types import FrameType

from phi_runtime.errors import ContextError
from phi_runtime.generation.config import Options
from phi_runtime.generation.engine import Engine
from phi_runtime.model import Phi

_HELP = "an empty line does nothing; /new begins again, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer"


def converse(phi: Phi, system: str | None, options: Options) -> None:
    """Read lines, stream replies, keep the history; the oldest turns are forgotten when the context is full.

    Ctrl-C stops an answer, which stays in the history as far as it came; at the prompt it leaves.
    """
    first = [] if system is None else [{"role": "system", "content": system}]
    phi.chat_prompt([*first, {"role": "user", "content": ""}])  # says at once what cannot be said at all
    tty = sys.stdin.isatty()
    if tty:
        import readline  # noqa: F401  (line editing and history, where the system has it)

        print(f"{phi.package.path.name} on {phi.backend}, {phi.context} tokens of context; {_HELP}")
    history = list(first)
    while True:
        try:
            line = input("\n> " if tty else "").strip()
        except EOFError:
            print()
            return
        if line == "/exit":
            return
        if line == "/new":
            history = list(first)
            continue
        if not line:
            continue
        history.append({"role": "user", "content": line})
        try:
            answer = _answer(phi, history, len(first), options)
        except ContextError as e:
            print(f"error: {e}", file=sys.stderr)
            history.pop()
            continue
        history.append({"role": "assistant", "content": answer})


def _answer(phi: Phi, history: list[dict[str, str]], kept: int, options: Options) -> str:
    """Print one reply as it comes; forget the oldest turns until the conversation leaves room for it."""
    tokens = phi.chat_prompt(history)
    forgotten = 0
    while len(tokens) > phi.context - min(options["max_tokens"], phi.context // 4) and len(history) > kept + 1:
        del history[kept : kept + 2]
        forgotten += 2
        tokens = phi.chat_prompt(history)
    if forgotten:
        print(f"[the oldest {forgotten} messages no longer fit and are forgotten]", file=sys.stderr)
    said: list[str] = []
    with _Stop(phi.engine) as stop, closing(phi.stream(tokens, **options)) as pieces:
        for piece in pieces:
            said.append(piece.text)
            print(piece.text, end="", flush=True)
            if stop.asked:
                break
    if stop.asked:
        print(" [stopped]", end="")
    print(flush=True)
    return "".join(said)


class _Stop:
    """Ctrl-C asks for an end instead of raising, as long as this is open."""

    def __init__(self, engine: Engine) -> None:
        self.asked, self._engine = False, engine

    def __enter__(self) -> "_Stop":
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = self._engine.cancelled = True
