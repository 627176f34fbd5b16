"""Training and decoding with and without one other busy process: with the libraries' own waiting, and with ours.

    phi-bench suite training-busy BUNDLES --out figures.json

BUNDLES holds gguf and onnx bundles. Rounds are interleaved, each run a process of its own; rates are tokens per second.
"before" is what libgomp and onnxruntime do by themselves, "after" what `phi_runtime.backends.waiting` makes them do.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from phi_bench.suites.runs import log, train

BEFORE = {"OMP_WAIT_POLICY": ""}  # nothing chosen, by the user either
TRAIN = {"schedule.steps": 12, "schedule.warmup_steps": 2, "samples": 0, "save_every": 1000}
WARM = 4  # steps
DECODE = """
import sys
import phi_runtime
from phi_runtime.backends import waiting
from phi_runtime.generation.engine import Engine
from phi_runtime.generation.sampler import Sampling
path, before, tokens = sys.argv[1], sys.argv[2] == "before", int(sys.argv[3])
if before:
    waiting.ONNXRUNTIME = ""
with phi_runtime.load(path, context=512) as phi:
    engine = Engine(phi.engine.backend, stop_tokens=())
    list(engine.stream([5, 6, 7], 8, Sampling(), speculate=False))
    steps = list(engine.stream([5, 6, 7], tokens + 1, Sampling(), speculate=False))
print(tokens / sum(s.seconds for s in steps[1:]))
"""


def training(before: bool, data: Path) -> float:
    """Tokens per second of the demo's recipe."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ.update(BEFORE if before else {})
        settings = TRAIN | {"data.tokenizer": data / "tokenizer", "data.shards": data / "shards"}
        try:
            train("phi3-demo", Path(folder) / "run", settings)
        finally:
            for name in BEFORE:
                os.environ.pop(name, None)
        lines = log(Path(folder) / "run")
    seconds = lines[-1]["seconds"] - lines[WARM - 1]["seconds"]
    return (lines[-1]["tokens"] - lines[WARM - 1]["tokens"]) / seconds


def decoding(path: Path, before: bool, tokens: int) -> float:
    """Tokens per second of a bundle."""
    command = [sys.executable, "-c", DECODE, str(path), "before" if before else "after", str(tokens)]
    done = subprocess.run(
        command, check=True, capture_output=True, text=True, env=os.environ | (BEFORE if before else {})
    )
    return float(done.stdout)


def main(argv: list[str]) -> None:
    """All cells of the table, round by round."""
    p = argparse.ArgumentParser("phi-bench suite training-busy", description=(__doc__ or "").splitlines()[0])
    p.add_argument("bundles", type=Path)
    p.add_argument("--training", type=Path, required=True, help="a folder with tokenizer and shards")
    p.add_argument("--tokens", type=int, default=64)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--only", default="train,gguf,onnx")
    p.add_argument("--out", type=Path, required=True)
    args = p.parse_args(argv)
    found: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        for busy in (False, True):
            other = subprocess.Popen([sys.executable, "-c", "while True: pass"]) if busy else None
            try:
                for what in args.only.split(","):
                    for before in (True, False):
                        name = f"{what} {'busy' if busy else 'idle'} {'before' if before else 'after'}"
                        rate = (
                            training(before, args.training)
                            if what == "train"
                            else decoding(args.bundles / what, before, args.tokens)
                        )
                        found.setdefault(name, []).append(rate)
                        print(f"{name}: {rate:.1f}", flush=True)
            finally:
                if other is not None:
                    other.kill()
                    other.wait()
    args.out.write_text(json.dumps(found, indent=1) + "\n")
    for name, rates in found.items():
        print(f"{name}: median {statistics.median(rates):.1f}, {min(rates):.1f} to {max(rates):.1f}")
