"""What the runtime saves by prompt lookup and by prefix caching, in interleaved rounds.

    phi-bench suite runtime lookup MODEL --text FILE
    phi-bench suite runtime prefix MODEL --text FILE

`lookup`: decoding with and without guesses, where the model says a text that repeats its prompt and one that does not:
the passes are the model's own, and the text is dictated, so that a checkpoint of random weights does as well. `prefix`:
seconds to the first token with a shared prefix of 1,000 tokens and without, in process and from a session on disk.
Beside the engines' own tools: `phi-bench run`.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import phi_runtime
from phi_runtime.generation.engine import Backend, Engine
from phi_runtime.generation.sampler import Sampling
from phi_runtime.model import Phi


def compare(one: Callable[[], float], other: Callable[[], float], names: tuple[str, str], rounds: int) -> None:
    """Alternate, and print each round's ratio and their median."""
    ratios = []
    for i in range(rounds):
        pair = (one(), other()) if i % 2 == 0 else (other(), one())[::-1]
        ratios.append(pair[0] / pair[1])
        print(f"{names[0]} {pair[0]:.2f}  {names[1]} {pair[1]:.2f}  ratio {ratios[-1]:.3f}", flush=True)
    print(f"median ratio {statistics.median(ratios):.3f} over {rounds} rounds")


class Dictated:
    """A backend that takes as long as it takes, and says what it is told to: so guessing is timed on any text."""

    def __init__(self, backend: Backend, text: list[int]) -> None:
        self._backend, self._text = backend, text
        self.name, self.vocab_size, self.context = backend.name, backend.vocab_size, backend.context
        self.trim, self.close = backend.trim, backend.close

    @property
    def position(self) -> int:
        """Tokens in the KV cache."""
        return self._backend.position

    def forward(self, tokens: list[int], all_logits: bool) -> np.ndarray:
        """The engine's logits, with the text's next token far above the others."""
        rows = self._backend.forward(tokens, all_logits).copy()
        for i, row in enumerate(rows):
            row[self._text[self.position - len(rows) + i + 1]] = 1e4
        return rows


def lookup(phi: Phi, text: str, tokens: int, rounds: int) -> None:
    """Prompt lookup on and off: a text with one token in forty changed, and one that is new throughout."""
    words = phi.tokenize(text)
    half = min(tokens, phi.context // 2 - 8)
    again = [t if i % 40 else 7 for i, t in enumerate(words[:half], 1)]
    for name, said in (("text to copy", words[:half] + again), ("text as it comes", words[: 16 + half])):
        engine = Engine(Dictated(phi.engine.backend, [*said, *said[:64]]), stop_tokens=())
        prompt = said[: len(said) - half]

        def run(speculate: bool) -> float:
            steps = list(engine.stream(prompt, half - 32, Sampling(), speculate=speculate))  # noqa: B023
            assert [s.token for s in steps] == said[len(prompt) :][: half - 32]  # noqa: B023
            return len(steps[1:]) / sum(s.seconds for s in steps[1:])

        run(False)
        print(f"{name}: {len(prompt)} tokens of prompt, {half - 32} of answer")
        compare(lambda: run(True), lambda: run(False), ("guessed", "plain"), rounds)


def prefix(path: str, text: str, rounds: int) -> None:
    """Seconds to the first token after 1,000 shared tokens and 16 new ones."""
    with phi_runtime.load(path) as phi, tempfile.TemporaryDirectory() as folder:
        shared = (phi.tokenize(text) * 9)[: min(1000, phi.context - 64)]
        kept = Path(folder) / "prefix.session"
        rng = np.random.default_rng(0)
        phi.generate(shared, max_tokens=1)
        phi.save_session(kept)
        rows = []
        for _ in range(rounds):
            new = [int(t) for t in rng.integers(3, phi.package.shape.vocab_size - 64, 16)]
            reused = phi.generate(shared + new, max_tokens=1)
            phi.engine.forget()
            whole = phi.generate(shared + new, max_tokens=1)
            phi.engine.forget()
            began = time.perf_counter()
            phi.load_session(kept)
            loaded = time.perf_counter() - began
            again = phi.generate(shared + new, max_tokens=1)
            rows.append((reused.ttft_s / whole.ttft_s, (loaded + again.ttft_s) / whole.ttft_s))
            print(f"whole {whole.ttft_s:.3f} s, reused {reused.ttft_s:.3f} s, from disk {loaded + again.ttft_s:.3f} s")
        medians = [statistics.median(column) for column in zip(*rows, strict=True)]
        print(f"{len(shared)} shared tokens: {medians[0]:.4f} of the whole in process, {medians[1]:.4f} from disk")


def main(argv: list[str]) -> None:
    """Run one comparison."""
    p = argparse.ArgumentParser("phi-bench suite runtime", description=(__doc__ or "").splitlines()[0])
    p.add_argument("comparison", choices=("lookup", "prefix"))
    p.add_argument("model")
    p.add_argument("--text", type=Path, required=True)
    p.add_argument("--tokens", type=int, default=48)
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--rounds", type=int, default=7)
    a = p.parse_args(argv)
    text = a.text.read_text(encoding="utf-8")
    if a.comparison == "lookup":
        with phi_runtime.load(a.model, threads=a.threads) as phi:
            lookup(phi, text, a.tokens, a.rounds)
    else:
        prefix(a.model, text, a.rounds)
