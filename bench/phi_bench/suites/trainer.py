"""Step time beside transformers' model under its Trainer, same data and sizes; and the share of the machine's own rate.

    PYTHONPATH=WHERE_ACCELERATE_IS phi-bench suite training --tokenizer DIR --data SHARDS --out DIR [--rounds 3]

Rounds are interleaved, each in a process of its own; the first steps do not count. Needs accelerate.
"""

import argparse
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from phi_bench.suites.runs import log, train
from phi_train.recipes.catalogue import get_recipe
from phi_train.recipes.estimate import plan

RECIPE = "phi3-proxy-small"  # 27 M parameters
WARM, STEPS = 4, 16


def main(argv: list[str]) -> None:
    """Print tokens per second of both, their ratio a round, and ours as a share of the matrix product's rate."""
    p = argparse.ArgumentParser("phi-bench suite training", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--tokenizer", type=Path, required=True)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--rounds", type=int, default=3)
    p.add_argument("--set", action="append", default=[], dest="settings")
    p.add_argument("--theirs", action="store_true", help=argparse.SUPPRESS)
    args = p.parse_args(argv)
    settings = [
        f"schedule.steps={STEPS}",
        "samples=0",
        "save_every=1000",
        f"data.tokenizer={args.tokenizer}",
        f"data.shards={args.data}",
    ]
    settings += args.settings
    if args.theirs:
        print(theirs(settings, args.data))
        return
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir()
    r = get_recipe(RECIPE, settings)
    flops = plan(r, 1, "h200").flops / r.tokens
    ratios, shares = [], []
    for n in range(args.rounds):
        peak = products()
        a = ours(args.out / str(n), settings, r.data.batch_size * r.data.sequence_length)
        command = [sys.executable, "-m", __spec__.name, *argv, "--theirs"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        b = float(said.split()[-1])
        peak = (peak + products()) / 2
        ratios.append(a / b)
        shares.append(a * flops / peak)
        print(
            f"round {n}: ours {a:.0f} tokens/s, transformers' Trainer {b:.0f}, {a / b:.2f}x; "
            f"ours is {a * flops / 1e9:.0f} of {peak / 1e9:.0f} GFLOP/s of bf16 products, {shares[-1]:.2f}",
            flush=True,
        )
    print(f"{flops / 1e6:.0f} MFLOP a token; median {statistics.median(ratios):.2f}x, {statistics.median(shares):.2f}")


def products() -> float:
    """Floating-point operations per second of bfloat16 matrix products, 2048 wide, a warm second of them."""
    a, b = (torch.randn(2048, 2048).bfloat16() for _ in range(2))
    for _ in range(3):
        a @ b
    began, n = time.perf_counter(), 0
    while time.perf_counter() - began < 1:
        a @ b
        n += 1
    return n * 2 * 2048**3 / (time.perf_counter() - began)


def ours(out: Path, settings: list[str], tokens: int) -> float:
    """Tokens per second of phi-train."""
    train(RECIPE, out, dict(setting.split("=", 1) for setting in settings))
    lines = log(out)
    return float(tokens * (STEPS - WARM) / (lines[-1]["seconds"] - lines[WARM - 1]["seconds"]))


def theirs(settings: list[str], data: Path) -> float:
    """Tokens per second of transformers."""
    from transformers import Phi3Config, Phi3ForCausalLM, Trainer, TrainerCallback, TrainingArguments

    from phi_train.data.shards import open_data

    r = get_recipe(RECIPE, settings)
    model = Phi3ForCausalLM(Phi3Config(**{**r.model.to_json(), "pad_token_id": 0, "attn_implementation": "sdpa"}))
    opened = open_data(data)
    rows = [torch.from_numpy(opened.window(i, r.data.sequence_length)) for i in range(STEPS * r.data.batch_size)]
    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: object, **__: object) -> None:
            times.append(time.perf_counter())

    arguments = TrainingArguments(
        output_dir="/nonexistent",
        max_steps=STEPS,
        per_device_train_batch_size=r.data.batch_size,
        use_cpu=True,
        bf16=True,
        learning_rate=r.optimizer.lr,
        weight_decay=r.optimizer.weight_decay,
        optim="adamw_torch_fused",
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    dataset = [{"input_ids": row, "labels": row} for row in rows]
    Trainer(model=model, args=arguments, train_dataset=dataset, callbacks=[Clock()]).train()
    return r.data.batch_size * r.data.sequence_length * (STEPS - WARM) / (times[-1] - times[WARM - 1])


if __name__ == "__main__":
    main(sys.argv[1:])
