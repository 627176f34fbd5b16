"""A context eight times as long: loss by position, factors by rule and searched for, before and after training there.

phi-bench suite training-longrope --tokenizer DIR --data SHARDS --out DIR [--seeds 0 1]
"""

import argparse
import shutil
from itertools import pairwise
from pathlib import Path

import torch

from phi_bench.suites.runs import phi, train
from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_train.checkpoints.extend import METHODS
from phi_train.data.shards import open_data
from phi_train.models import load_model

SHORT, LONG = 128, 1024
MODEL = {
    "model.vocab_size": 768, "model.hidden_size": 192, "model.intermediate_size": 512, "model.num_hidden_layers": 4,
    "model.num_attention_heads": 2, "model.num_key_value_heads": 2, "model.max_position_embeddings": SHORT,
    "model.sliding_window": "none", "samples": 0,
}  # fmt: skip
BINS = [0, 64, 128, 256, 512, 768, 1023]


def main(argv: list[str]) -> None:
    """Print a row a way."""
    p = argparse.ArgumentParser("phi-bench suite training-longrope", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--tokenizer", type=Path, required=True)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    args = p.parse_args(argv)
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir()
    rows = torch.from_numpy(open_data(args.data).heldout_windows(LONG, 48))
    print("loss by position:", *(f"{a}-{b}" for a, b in pairwise(BINS)), "| all | short context alone")
    for seed in args.seeds:
        common = {"tokenizer": args.tokenizer, "data": args.data, "seed": seed}
        base = args.out / f"base-{seed}"
        train("phi3-demo", base, {**common, **MODEL, "sequence_length": SHORT, "batch_size": 16, "steps": 800})
        show(f"seed {seed}, base", base, rows[:, :SHORT])
        for method in METHODS:
            out = args.out / f"{method}-{seed}"
            phi(
                "extend", base, "--context", LONG, "--data", args.data, "--method", method, "--out", out, "--seed", seed
            )
            show(f"seed {seed}, {method}", out, rows)
        for method in METHODS:
            out = args.out / f"{method}-{seed}"
            more = {"model": out, "init_from": out, "sequence_length": LONG, "batch_size": 2, "steps": 100}
            more |= {
                "learning_rate": 5e-4,
                "final_learning_rate": 0,
                "warmup_steps": 10,
                "samples": 0,
                "short_every": 2,
            }
            train("phi3-demo", args.out / f"{method}-{seed}-trained", {**common, **more})
            show(f"seed {seed}, {method}, 100 steps there", args.out / f"{method}-{seed}-trained", rows)


@torch.no_grad()
def show(name: str, folder: Path, rows: torch.Tensor) -> None:
    """Print the losses of a checkpoint, nats per token."""
    model = load_model(open_checkpoint(folder)).eval()

    def losses(texts: torch.Tensor) -> torch.Tensor:
        parts = [torch.nn.functional.cross_entropy(model(t[None, :-1])[0], t[1:], reduction="none") for t in texts]
        return torch.stack(parts).mean(0)

    by_position, short = losses(rows), losses(rows[:, :SHORT])
    bins = [float(by_position[a:b].mean()) for a, b in pairwise(BINS) if a < len(by_position)]
    said = " ".join(f"{x:.3f}" for x in bins)
    print(f"{name}: {said} | {float(by_position.mean()):.3f} | {float(short.mean()):.3f}", flush=True)
