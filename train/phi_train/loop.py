"""The training loop: DeepSpeed is the engine, this is the order of things.

A run's folder is the Hugging Face checkpoint it will become; what training itself needs lies in
`training/` inside it: recipe.json, state/, log.jsonl, summary.json, and the tokenizer and shards
where the recipe makes its own.
"""

import dataclasses
import json
import math
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import deepspeed
import numpy as np
from torch import Tensor, nn
from torch.nn import functional

from phi_runtime.backends import cores
from phi_runtime.config import AnyConfig, read_json
from phi_runtime.errors import OutputExistsError, UsageError
from phi_runtime.files import disk_full_named, sha256, write_file
from phi_runtime.tokenizer import FILE, Tokenizer
from phi_train.checkpoint import write_checkpoint
from phi_train.data import Data, open_data, write_shards
from phi_train.models import build
from phi_train.models.attention import init_weights
from phi_train.recipe import Recipe
from phi_train.state import load_state, save_state
from phi_train.tokenizer import END_OF_TEXT, train_tokenizer

# Told what happens: (what, steps done, steps in all, figures).
Progress = Callable[[str, int, int, dict[str, float]], None]


@dataclass(frozen=True)
class Summary:
    """What a finished run learned. Losses are nats per held-out token."""

    parameters: int
    steps: int
    tokens: int
    seconds: float
    tokens_per_second: float
    initial_loss: float
    final_loss: float
    unigram_loss: float
    heldout_tokens: int


def train(recipe: Recipe, out: Path, progress: Progress = lambda *_: None) -> Summary:
    """Run a recipe into `out`, or continue the run that is there; the checkpoint appears at the end.

    Raises UsageError for a recipe or data that do not fit, OutputExistsError for a foreign folder.
    """
    training = out / "training"
    _claim(recipe, out, training)
    if (training / "summary.json").is_file() and (out / "config.json").is_file():
        return Summary(**read_json(training / "summary.json"))
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UsageError("this version trains on one process; start it without torchrun or the deepspeed launcher")
    tokenizer, data = _prepare(recipe, training, progress)
    config = _with_tokens(recipe.model, tokenizer)
    torch.set_num_threads(cores())
    torch.manual_seed(recipe.seed)
    model = build(config)
    init_weights(model, recipe.seed)
    heldout = torch.from_numpy(data.heldout_windows(recipe.sequence_length, recipe.eval_windows))
    initial = evaluate(model, heldout, recipe)
    engine, optimizer = _engine(model, recipe)
    done, seconds = load_state(training / "state", model, optimizer)
    log = _Log(training / "log.jsonl", done)
    began = time.perf_counter() - seconds
    for step in range(done, recipe.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(recipe, step)
        rows = data.batch(step, recipe.batch_size, recipe.sequence_length, recipe.seed)
        loss = _loss(engine, torch.from_numpy(rows), recipe)
        engine.backward(loss)
        engine.step()
        seconds = time.perf_counter() - began
        figures = {
            "loss": loss.item(),
            "learning_rate": learning_rate(recipe, step),
            "tokens": (step + 1) * rows.size,
            "seconds": seconds,
        }
        if not math.isfinite(figures["loss"]):
            raise UsageError(f"{out}: the loss became {figures['loss']} at step {step}; lower learning_rate")
        log.add(step + 1, figures)
        progress("training", step + 1, recipe.steps, figures)
        if (step + 1) % recipe.save_every == 0 or step + 1 == recipe.steps:
            save_state(training / "state", step + 1, seconds, model, optimizer)
    tokens = recipe.steps * recipe.batch_size * recipe.sequence_length
    summary = Summary(
        parameters=sum(p.numel() for p in model.parameters()),
        steps=recipe.steps,
        tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        initial_loss=initial,
        final_loss=evaluate(model, heldout, recipe),
        unigram_loss=data.unigram_loss(heldout[:, 1:].numpy()),
        heldout_tokens=heldout[:, 1:].numel(),
    )
    write_file(training / "summary.json", json.dumps(dataclasses.asdict(summary), indent=1) + "\n")
    write_checkpoint(out, config, dict(model.named_parameters()), tokenizer)
    shutil.rmtree(training / "state")  # the run is over: nothing will be continued
    return summary


def learning_rate(r: Recipe, step: int) -> float:
    """Linear warm-up, then a cosine down to `final_learning_rate`."""
    if step < r.warmup_steps:
        return r.learning_rate * (step + 1) / r.warmup_steps
    share = (step - r.warmup_steps) / max(1, r.steps - r.warmup_steps)
    return r.final_learning_rate + (r.learning_rate - r.final_learning_rate) * (1 + math.cos(math.pi * share)) / 2


@torch.no_grad()
def evaluate(model: nn.Module, rows: Tensor, recipe: Recipe) -> float:
    """Mean next-token loss, nats, over windows [n, T] of tokens."""
    losses = [_loss(model, rows[i : i + recipe.batch_size], recipe) for i in range(0, len(rows), recipe.batch_size)]
    sizes = [len(rows[i : i + recipe.batch_size]) for i in range(0, len(rows), recipe.batch_size)]
    return float(np.average([x.item() for x in losses], weights=sizes))


def _loss(model: Any, rows_BT: Tensor, recipe: Recipe) -> Tensor:
    device = next(model.parameters()).device
    rows_BT = rows_BT.to(device)
    with torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"):
        logits_BTV = model(rows_BT[:, :-1])
    return functional.cross_entropy(logits_BTV.flatten(0, 1).float(), rows_BT[:, 1:].flatten())


def _engine(model: nn.Module, r: Recipe) -> tuple[Any, torch.optim.Optimizer]:
    """The DeepSpeed engine around the model, on this one process."""
    # Decay pulls matrices towards zero, norms it would pull off their scale.
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": r.weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=r.learning_rate, betas=(r.beta1, r.beta2), fused=True)
    config = {
        "train_batch_size": r.batch_size,
        "train_micro_batch_size_per_gpu": r.batch_size,
        "gradient_clipping": r.gradient_clipping,
        "zero_optimization": {"stage": 0},
        "steps_per_print": 10**9,
    }
    if not torch.distributed.is_initialized():
        # One process has nobody to share memory with, so DeepSpeed need not compile its op for it.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        os.environ.setdefault("LOCAL_RANK", "0")
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        # One process meets nobody: no port to be taken, no file to be left.
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # its stub is missing
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    return engine, optimizer


def _claim(recipe: Recipe, out: Path, training: Path) -> None:
    """Make the folder this recipe's own, or see that it already is."""
    record = training / "recipe.json"
    wanted = json.loads(json.dumps(dataclasses.asdict(recipe)))
    if record.is_file():
        there = read_json(record)
        changed = sorted(k for k in wanted if there.get(k) != wanted[k])
        if changed:
            k = changed[0]
            raise UsageError(
                f"{out}: holds a run with {k}={there.get(k)}, not {wanted[k]}; choose another --out, or its settings"
            )
        return
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputExistsError(f"{out}: is there already and holds no run of ours; choose another --out")
    write_file(record, json.dumps(wanted, indent=1) + "\n")


def _prepare(recipe: Recipe, training: Path, progress: Progress) -> tuple[Path, Data]:
    """The tokenizer and the data, made first where the recipe names none."""
    tokenizer = Path(recipe.tokenizer) if recipe.tokenizer else training / "tokenizer"
    folder = Path(recipe.data) if recipe.data else training / "shards"
    if not recipe.tokenizer and not tokenizer.exists():
        progress("training the tokenizer", 0, recipe.steps, {})
        train_tokenizer(recipe.corpus, recipe.model.vocab_size, tokenizer)
    if not recipe.data and not folder.exists():
        progress("tokenising the corpus", 0, recipe.steps, {})
        write_shards(recipe.corpus, tokenizer, folder)
    data = open_data(folder)
    if not (tokenizer / FILE).is_file() or data.tokenizer_sha256 != sha256(tokenizer / FILE):
        raise UsageError(f"{folder}: was not tokenised with {tokenizer}; make it anew with phi-train shards")
    if data.vocab_size > recipe.model.vocab_size:
        raise UsageError(f"{folder}: has {data.vocab_size} token ids, the model {recipe.model.vocab_size}")
    available = data.windows(recipe.sequence_length)
    if len(data.heldout) < recipe.sequence_length:
        raise UsageError(f"{folder}: holds out {len(data.heldout)} tokens, fewer than one sequence; give more data")
    if available < recipe.batch_size:
        raise UsageError(
            f"{folder}: holds {available} windows of {recipe.sequence_length} tokens, "
            f"a batch takes {recipe.batch_size}; give more data or a smaller batch"
        )
    return tokenizer, data


def _with_tokens(config: AnyConfig, folder: Path) -> AnyConfig:
    """The architecture with the tokenizer's own special tokens."""
    tokenizer = Tokenizer(folder)
    end = tokenizer.id(END_OF_TEXT)
    return dataclasses.replace(config, bos_token_id=tokenizer.id("<s>"), eos_token_id=end, pad_token_id=end)


class _Log:
    """One JSON object a step; lines beyond the step that is continued from are dropped."""

    def __init__(self, path: Path, done: int) -> None:
        lines = path.read_text().splitlines()[:done] if path.is_file() else []
        write_file(path, "".join(f"{line}\n" for line in lines))
        self._path = path

    def add(self, step: int, figures: dict[str, float]) -> None:
        with disk_full_named(self._path), open(self._path, "a") as f:
            f.write(json.dumps({"step": step, **{k: round(v, 6) for k, v in figures.items()}}) + "\n")
