"""Tokens per second that `plan` predicts, beside what a process reaches; all models in turns, so that a slow spell
meets all alike.

    phi-export calibrate-speed
    python bench/rivals/speed.py MODEL[@BACKEND] ...
"""

import argparse
import statistics
import subprocess
import sys

import phi_runtime

_CHILD = """
import statistics, sys, phi_runtime
with phi_runtime.load(sys.argv[1], backend=sys.argv[2] or None, context=256) as phi:
    tokens = [5 + 7 * i % 1000 for i in range(16)]
    rounds = [phi.generate(tokens, max_tokens=16, speculate=False).decode_tps for _ in range(2)]
print(max(rounds))
"""


def main() -> None:
    """Measure, and print a line for each."""
    p = argparse.ArgumentParser()
    p.add_argument("models", nargs="+", metavar="MODEL[@BACKEND]")
    p.add_argument("--rounds", type=int, default=3)
    args = p.parse_args()
    reached: dict[str, list[float]] = {m: [] for m in args.models}
    for _ in range(args.rounds):
        for model in args.models:
            path, _, backend = model.partition("@")
            done = subprocess.run([sys.executable, "-c", _CHILD, path, backend], capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            reached[model].append(float(done.stdout))
    for model, found in reached.items():
        path, _, backend = model.partition("@")
        said = phi_runtime.plan(path, context=256, backend=backend or None).tokens_per_second
        median = statistics.median(found)
        if said is None:
            print(f"{model}: {median:.2f} tokens/s, nothing predicted")
        else:
            print(
                f"{model}: {median:.2f} tokens/s, predicted {said:.2f} ({100 * (said / median - 1):+.1f} %)", flush=True
            )


if __name__ == "__main__":
    main()
