"""What only a GPU shows of the trainer, in one go of at most eight minutes on one H100 or H200.

    phi-bench suite gpu --out DIR [--dry]

Logits of each architecture beside those of the processor, in bf16 and fp16; flash attention beside plain attention,
texts kept apart too; one rank of NCCL, killed and continued; tokens per second and utilisation of a stack shaped as
phi-3-mini. `--dry` runs all of it on the processor with small sizes. Writes DIR/gpu.json; exit code 1 for a check that
failed.
"""

import argparse
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from phi_bench.suites.runs import log, train
from phi_runtime.errors import OutputExistsError, UsageError
from phi_train.models import CausalLM, build, flash
from phi_train.models.initializer import init_weights
from phi_train.models.precision import DTYPES
from phi_train.recipes.catalogue import get_recipe

ARCHITECTURES = ("phi1-demo", "phi3-demo", "phi3-small-8k-demo", "tinystories-1m-demo")
CLOSE = {"bf16": 0.05, "fp16": 0.01}  # most difference of logits, by the largest logit
TARGET = 0.48  # of the dense bf16 peak
WARM = 4  # steps
STACK: dict[str, object] = {
    "model.num_hidden_layers": 8,
    "data.batch_size": 8,
    "data.sequence_length": 4096,
    "schedule.steps": 12,
}
SMALL: dict[str, object] = {
    "model.hidden_size": 64, "model.intermediate_size": 128, "model.num_hidden_layers": 2,
    "model.num_attention_heads": 4, "model.num_key_value_heads": 4, "data.sequence_length": 32,
}  # fmt: skip
SMALL_VOCABULARY: dict[str, object] = {
    "model.eos_token_id": 2, "model.pad_token_id": 2, "model.vocab_size": 4096,
}  # fmt: skip
VARIANTS: dict[str, dict[str, object]] = {
    "float32 weights": {},
    "bf16 weights": {"weights": "bf16", "zero_stage": 1},
    "bf16 weights, compiled": {"weights": "bf16", "zero_stage": 1, "compile": True},
    "bf16 weights, compiled, cheap activations again": {
        "weights": "bf16", "zero_stage": 1, "compile": True, "gradient_checkpointing": "selective",
    },
    "bf16 weights, activations again": {"weights": "bf16", "zero_stage": 1, "gradient_checkpointing": True},
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """A figure; good: whether it is as it should be, None where it is only told."""

    what: str
    figure: str
    good: bool | None = None


def main(argv: list[str]) -> None:
    """Run all checks, one after the other, and print the table."""
    p = argparse.ArgumentParser("phi-bench suite gpu", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--out", type=Path, required=True, help="folder for gpu.json and what is trained")
    p.add_argument("--dry", action="store_true", help="on the processor, with small sizes")
    args = p.parse_args(argv)
    if args.out.exists():
        raise OutputExistsError(f"{args.out}: is there already; choose another --out")
    if args.dry:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # of phi-train too
    elif not torch.cuda.is_available():
        raise UsageError("there is no GPU that PyTorch can use; --dry tries the suite without one")
    device = torch.device("cpu" if args.dry else "cuda")
    args.out.mkdir(parents=True)
    rows: list[Row] = []
    sections: tuple[Callable[[], list[Row]], ...] = (
        lambda: [Row("device", _named(device)), Row("flash attention", flash.kernel()[0])],
        lambda: [row for name in ARCHITECTURES for row in logits(name, device)],
        lambda: flash_beside_plain(device),
        lambda: resumed(args.out),
        lambda: stack(args.out, args.dry),
    )
    for section in sections:
        for row in section():
            mark = {True: "ok  ", False: "FAIL", None: "    "}[row.good]
            print(f"{mark} {row.what:60} {row.figure}", flush=True)
            rows.append(row)
    (args.out / "gpu.json").write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    if any(row.good is False for row in rows):
        sys.exit(1)


def _named(device: torch.device) -> str:
    if device.type == "cpu":
        return f"processor ({platform.machine()}), torch {torch.__version__}"
    gib = torch.cuda.get_device_properties(device).total_memory / 2**30
    return f"{torch.cuda.get_device_name(device)}, {gib:.0f} GiB, torch {torch.__version__}, CUDA {torch.version.cuda}"


def logits(recipe: str, device: torch.device) -> list[Row]:
    """Of a drawn model here and there: as far apart as a type's rounding, and the likeliest token the same."""
    model = build(get_recipe(recipe, []).model).eval()
    init_weights(model, 0)
    tokens = torch.randint(0, 200, (2, 64), generator=torch.Generator().manual_seed(0))
    found = []
    with torch.no_grad():
        exact = model(tokens)
        model.to(device)
        for name, most in CLOSE.items():
            said = computed(model, tokens.to(device), DTYPES[name]).cpu()
            off = float((said - exact).abs().max() / exact.abs().max())
            same = float((said.argmax(-1) == exact.argmax(-1)).float().mean())
            figure = f"difference {off:.2g} of the largest logit, same token {100 * same:.1f} %"
            found.append(Row(f"logits of {recipe} in {name} beside float32 on the processor", figure, off < most))
    return found


def computed(model: CausalLM, tokens: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Logits with products of a type, as the trainer computes them, in float32."""
    with torch.autocast(tokens.device.type, dtype):
        found: torch.Tensor = model(tokens)
    return found.float()


def flash_beside_plain(device: torch.device) -> list[Row]:
    """Values, gradients and time of attention, texts whole and kept apart, with a window and without."""
    dry = device.type == "cpu"
    length = 96 if dry else 2048
    changes = [f"{key}={value}" for key, value in SMALL.items() if dry and key.startswith("model.")]
    changes += ["model.num_attention_heads=4", "model.num_key_value_heads=2"]
    found = []
    for window in (None, length // 3):
        sizes = [f"model.max_position_embeddings={length}", f"data.sequence_length={length}"]
        cut = [] if window is None else [f"model.sliding_window={window}"]
        model = build(get_recipe("phi3-demo", [*changes, *sizes, *cut]).model).to(device)
        tokens = torch.randint(0, 200, (4, length), device=device)
        apart = (torch.arange(length, device=device) // (length // 4)).expand(4, length)
        for documents in (None, apart):
            said = f"window {window}, {'texts apart' if documents is not None else 'texts whole'}"
            results = [attended(model, tokens, documents, by) for by in (flash.usable, lambda q, dropout: False)]
            (values, gradient, seconds), (plain, its_gradient, its_seconds) = results
            off = float((values - plain).abs().max() / plain.abs().max())
            of_gradient = float((gradient - its_gradient).abs().max() / its_gradient.abs().max())
            figure = f"{off:.2g}, gradients {of_gradient:.2g}; {1e3 * seconds:.1f} ms beside {1e3 * its_seconds:.1f}"
            found.append(Row(f"flash beside plain attention, {said}", figure, off < 0.05 and of_gradient < 0.1))
    return found


def attended(
    model: CausalLM, tokens: torch.Tensor, documents: torch.Tensor | None, by: Callable[..., bool]
) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Logits, the embedding's gradient, and the seconds of both."""
    before, flash.usable = flash.usable, by
    times = []
    try:
        for _ in range(3):
            model.zero_grad()
            began = time.perf_counter()
            with torch.autocast(tokens.device.type, torch.bfloat16, enabled=tokens.is_cuda):
                values = model(tokens, documents)
            values.float().square().mean().backward()
            gradient = next(p.grad for p in model.parameters() if p.grad is not None).float().cpu()
            times.append(time.perf_counter() - began)
    finally:
        flash.usable = before
    return values.detach().float().cpu(), gradient, min(times)


def resumed(out: Path) -> list[Row]:
    """A run of one rank that is killed and goes on has the losses and bytes of one that is not."""
    settings: dict[str, object] = dict(SMALL)
    settings |= {"data.batch_size": 8, "schedule.steps": 20, "save_every": 4, "samples": 0, "data.eval_windows": 2}
    settings |= {f"parallelism.{name}": value for name, value in VARIANTS["bf16 weights"].items()}
    settings["parallelism.precision"] = "bf16"
    train("phi3-demo", out / "whole", settings)
    made = out / "whole" / "training"
    settings |= {"data.tokenizer": made / "tokenizer", "data.shards": made / "shards"}
    said = [part for k, v in settings.items() for part in ("--set", f"{k}={v}")]
    command = [str(Path(sys.executable).parent / "phi-train"), "phi3-demo", "--out", str(out / "broken"), *said]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while len(log(out / "broken")) < 6 and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    killed = not (out / "broken" / "config.json").exists()
    train("phi3-demo", out / "broken", settings)
    losses = [[line["loss"] for line in log(out / name)] for name in ("whole", "broken")]
    same = losses[0] == losses[1] and len(losses[0]) == settings["schedule.steps"]
    bytes_ = [(out / name / "model.safetensors").read_bytes() for name in ("whole", "broken")]
    figure = f"{len(losses[0])} losses {'the same' if same else 'not the same'}, bytes {bytes_[0] == bytes_[1]}"
    return [Row("one rank, killed and continued", figure, killed and same and bytes_[0] == bytes_[1])]


def stack(out: Path, dry: bool) -> list[Row]:
    """Tokens per second and the share of the peak, by way of computing."""
    made = out / "whole" / "training"
    settings = STACK | (SMALL | SMALL_VOCABULARY | {"schedule.steps": WARM + 2} if dry else {})
    settings |= {"data.tokenizer": made / "tokenizer", "data.shards": made / "shards", "data.eval_windows": 2}
    settings |= {"samples": 0, "save_every": 1000, "schedule.warmup_steps": 1, "parallelism.precision": "bf16"}
    settings["parallelism.micro_batch_size"] = 4
    found, best = [], 0.0
    for name, changes in VARIANTS.items():
        folder = out / "stack"
        shutil.rmtree(folder, ignore_errors=True)
        own = settings | {f"parallelism.{key}": value for key, value in changes.items()}
        try:
            train("phi3-mini-4k", folder, own)
        except subprocess.CalledProcessError as e:
            found.append(Row(f"stack of phi-3-mini, {name}", f"phi-train ended with {e.returncode}", False))
            continue
        lines = log(folder)[WARM:]
        rate = statistics.median(line["tokens_per_second"] for line in lines)
        share = statistics.median(line["utilisation"] for line in lines)
        best = max(best, share)
        found.append(Row(f"stack of phi-3-mini, {name}", f"{rate:.0f} tokens/s, {100 * share:.1f} % of the peak"))
    shutil.rmtree(out / "stack", ignore_errors=True)
    met = None if dry else best >= TARGET
    found.append(Row(f"best share of the peak, target {100 * TARGET:.0f} %", f"{100 * best:.1f} %", met))
    return found
