"""What fine-tuning, preferences and training on the exporter's grid change, over several seeds.

    phi-bench suite training-stages --tokenizer DIR --data SHARDS --out DIR [--seeds 3]

A small Phi-3 learns the standard library, then answers to questions about its functions (SFT), then not to say its own
wrong answers (DPO); and goes on with and without its weights rounded to int4, the same steps and data.
"""

import argparse
import json
import shutil
from pathlib import Path

import torch

from phi_bench.suites.runs import phi, train
from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_train.data.conversations import Preferences, open_examples
from phi_train.data.questions import write_questions
from phi_train.data.shards import open_data
from phi_train.models import load_model
from phi_train.trainer.objectives import log_likelihoods
from phi_train.trainer.qat import enable_qat

MODEL = {
    "model.vocab_size": 768, "model.hidden_size": 192, "model.intermediate_size": 512, "model.num_hidden_layers": 4,
    "model.max_position_embeddings": 256, "model.sliding_window": "none", "sequence_length": 256, "batch_size": 8,
    "samples": 0,
}  # fmt: skip
GRID = "int4-g256"


def main(argv: list[str]) -> None:
    """Print a row a seed."""
    p = argparse.ArgumentParser("phi-bench suite training-stages", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--tokenizer", type=Path, required=True)
    p.add_argument("--data", type=Path, required=True)
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--seeds", type=int, default=3)
    args = p.parse_args(argv)
    shutil.rmtree(args.out, ignore_errors=True)
    args.out.mkdir()
    questions, asked = args.out / "questions.jsonl", args.out / "asked.jsonl"
    write_questions("stdlib", questions)
    lines = questions.read_text().splitlines(keepends=True)
    learnt = args.out / "learnt.jsonl"
    learnt.write_text("".join(lines[:-300]))
    asked.write_text("".join(lines[-300:]))
    phi("shards", "--conversations", learnt, "--tokenizer", args.tokenizer, "--out", args.out / "sft-data")
    for seed in range(args.seeds):
        print(json.dumps({"seed": seed, **one(args, seed, learnt, asked)}), flush=True)


def one(args: argparse.Namespace, seed: int, learnt: Path, asked: Path) -> dict[str, float]:
    """All stages of one seed."""
    out = args.out / str(seed)
    out.mkdir()
    common = {**MODEL, "seed": seed, "tokenizer": args.tokenizer}
    train("phi3-demo", out / "base", {**common, "data": args.data, "steps": 600})
    found: dict[str, float] = {}

    sft = {"data": args.out / "sft-data", "objective": "sft", "init_from": out / "base", "steps": 200}
    tuned = train("phi3-demo", out / "sft", {**common, **sft, "learning_rate": 1e-3})
    found |= {"sft before": tuned["initial_loss"], "sft after": tuned["final_loss"]}

    phi("make-preferences", out / "sft", "--conversations", learnt, "--most", 2000, "--out", out / "pairs.jsonl")
    phi("shards", "--conversations", out / "pairs.jsonl", "--tokenizer", args.tokenizer, "--out", out / "pairs")
    dpo = {"data": out / "pairs", "objective": "dpo", "init_from": out / "sft", "steps": 60, "batch_size": 16}
    preferred = train("phi3-demo", out / "dpo", {**common, **dpo, "learning_rate": 1e-4, "eval_windows": 200})
    found |= {"dpo before": preferred["initial_loss"], "dpo after": preferred["final_loss"]}
    for name in ("sft", "dpo"):
        found[f"preferred is likelier, {name}"] = likelier(out / name, out / "pairs")
        found[f"right of 300, {name}"] = right(out / name, asked, out / f"{name}.asked.jsonl")

    more = {**common, "data": args.data, "init_from": out / "base", "steps": 200, "warmup_steps": 10}
    more |= {"learning_rate": 3e-4, "final_learning_rate": 1e-5}
    train("phi3-demo", out / "without", more)
    train("phi3-demo", out / "with", {**more, "rounding": GRID})
    for name in ("without", "with"):
        found[f"16 bits, {name}"] = loss(out / name, args.data, None)
        found[f"int4, {name}"] = loss(out / name, args.data, GRID)
    return {k: round(v, 4) for k, v in found.items()}


def right(checkpoint: Path, asked: Path, out: Path) -> float:
    """How many of 300 questions that nothing was learnt from are answered as they stand."""
    said = phi("make-preferences", checkpoint, "--conversations", asked, "--most", 300, "--out", out)
    return float(said.split("the model answers ")[1].split()[0])


@torch.no_grad()
def likelier(checkpoint: Path, pairs: Path) -> float:
    """Share of the held-out pairs whose preferred answer the model finds likelier."""
    batch = Preferences(open_examples(pairs), 1, 256, 0, 1000, 0).heldout()
    said = log_likelihoods(load_model(open_checkpoint(checkpoint)), batch)
    return float((said[:, 0] > said[:, 1]).float().mean())


@torch.no_grad()
def loss(checkpoint: Path, data: Path, grid: str | None) -> float:
    """Held-out nats per token, the weights on a grid where one is given."""
    model = load_model(open_checkpoint(checkpoint))
    if grid is not None:
        enable_qat(model, grid)
    rows = torch.from_numpy(open_data(data).heldout_windows(256, 64))
    logits = model(rows[:, :-1])
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten()))
