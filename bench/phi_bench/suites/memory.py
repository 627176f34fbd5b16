"""What `phi_runtime.plan` predicts beside what a process that does it comes to, for models, contexts and caches.

    phi-bench suite memory MODEL [MODEL ...] --contexts 512,2048 --kv f16,q8_0 --out figures.json

Each measurement is a process of its own that loads the model, reads a prompt of 300 tokens (or what fits) and writes
eight; its peak is the system's own figure (VmHWM, Linux).
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

_CHILD = """
import sys, phi_runtime
path, context, kv = sys.argv[1], int(sys.argv[2]), sys.argv[3]
with phi_runtime.load(path, context=context, kv=kv) as phi:
    prompt = [5 + i % 200 for i in range(min(700, context - 8))]
    phi.generate(prompt, max_tokens=8)
with open("/proc/self/status") as f:
    print(next(int(line.split()[1]) * 1024 for line in f if line.startswith("VmHWM:")))
"""


def main(argv: list[str]) -> None:
    """Predict, run, compare."""
    p = argparse.ArgumentParser("phi-bench suite memory", description=(__doc__ or "").splitlines()[0])
    p.add_argument("models", nargs="+")
    p.add_argument("--contexts", default="512,2048")
    p.add_argument("--kv", default="f16,q8_0", help="of GGUF files; others have one")
    p.add_argument("--out", type=Path)
    args = p.parse_args(argv)
    from phi_runtime.backends import choose_backend, kv_types
    from phi_runtime.package.open import open_package
    from phi_runtime.planning.memory import predict

    rows = []
    for model in args.models:
        package = open_package(model)
        known = kv_types(package, choose_backend(package, None))
        kinds = [k for k in args.kv.split(",") if k in known] or list(known)
        for context in (c for c in map(int, args.contexts.split(",")) if c <= package.context):
            for kv in kinds:
                said = predict(package, "this machine", context, kv, 1 << 60)
                command = [sys.executable, "-c", _CHILD, model, str(context), kv]
                peak = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
                error = said.peak / peak - 1
                print(f"{model} {context:6} {kv:6} said {said.peak:>13,} measured {peak:>13,} {100 * error:+.2f} %")
                print(f"    {said.arithmetic()}", flush=True)
                rows.append({"model": model, "context": context, "kv": kv, "predicted": said.peak, "measured": peak})
    if args.out is not None:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")
