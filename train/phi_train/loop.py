"""The training loop: DeepSpeed is the engine, this is the order of things.

A run's folder is the Hugging Face checkpoint it will become; what training itself needs lies in
`training/` inside it: recipe.json, state/, log.jsonl, summary.json, and the tokenizer and shards
where the recipe makes its own.
"""

import dataclasses
import json
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from phi_runtime.checkpoint import open_checkpoint
from phi_runtime.config import AnyConfig, read_json
from phi_runtime.errors import OutputExistsError, UsageError
from phi_runtime.files import disk_full_named, sha256, write_file
from phi_runtime.memory import available
from phi_runtime.tokenizer import FILE, Tokenizer
from phi_train.checkpoint import write_checkpoint
from phi_train.data import Data, open_data, write_shards
from phi_train.engine import Ranks, any_of, barrier, join, make_engine, mean, share
from phi_train.models import CausalLM, build
from phi_train.models.attention import init_weights
from phi_train.plan import check_memory
from phi_train.recipe import Recipe
from phi_train.state import Counters, full_weights, load_state, save_state
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

    Under torchrun or the deepspeed launcher every process calls it. A batch whose loss is no number, or far above the
    last ones', is left out, after going back to the last state where the weights are spoilt too.
    Raises UsageError for a recipe or data that do not fit, and for a run that goes wrong again and again;
    OutputExistsError for a foreign folder; Stopped after SIGTERM, the state saved.
    """
    if recipe.precision == "fp16":
        raise UsageError("float16, with its scaled loss, is for plans only so far; train with --set precision=bf16")
    ranks = join()
    micro, _ = share(recipe, ranks)
    free = torch.cuda.mem_get_info(ranks.device)[0] if ranks.device.type == "cuda" else available()
    check_memory(recipe, micro, ranks.world, ranks.local_world if ranks.device.type == "cpu" else 1, free)
    training = out / "training"
    if ranks.first:
        _claim(recipe, out, training)
    barrier()
    if (training / "summary.json").is_file() and (out / "config.json").is_file():
        return Summary(**read_json(training / "summary.json"))
    if ranks.first:
        _prepare(recipe, training, progress)
    barrier()
    tokenizer, data = _prepare(recipe, training, progress)
    config = _with_tokens(recipe.model, tokenizer)
    torch.manual_seed(recipe.seed)
    model = build(config)
    if recipe.init_from is None:
        init_weights(model, recipe.seed)
    else:
        _load_weights(model, config, Path(recipe.init_from))
    model.dropout, model.checkpoint_activations = recipe.dropout, recipe.checkpoint_activations
    heldout = torch.from_numpy(data.heldout_windows(recipe.sequence_length, recipe.eval_windows))
    engine = make_engine(model.to(ranks.device), recipe, ranks)
    run = _Run(recipe, out, data, engine, ranks, progress)
    initial = run.evaluate(heldout)
    seconds = run.steps()
    summary = Summary(
        parameters=sum(math.prod(shape) for shape in config.tensor_shapes().values()),
        steps=recipe.steps,
        tokens=recipe.tokens,
        seconds=seconds,
        tokens_per_second=recipe.tokens / seconds,
        initial_loss=initial,
        final_loss=run.evaluate(heldout),
        unigram_loss=data.unigram_loss(heldout[:, 1:].numpy()),
        heldout_tokens=heldout[:, 1:].numel(),
    )
    weights = full_weights(engine)
    if ranks.first:
        write_file(training / "summary.json", json.dumps(dataclasses.asdict(summary), indent=1) + "\n")
        write_checkpoint(out, config, weights, tokenizer)
        shutil.rmtree(training / "state")  # the run is over: nothing will be continued
    barrier()
    return summary


class Stopped(SystemExit):
    """SIGTERM came: the state was saved, and the same command goes on from there."""


class _Run:
    """The steps of a run on this process."""

    def __init__(self, recipe: Recipe, out: Path, data: Data, engine: Any, ranks: Ranks, progress: Progress) -> None:
        self.recipe, self.out, self.data, self.engine, self.ranks = recipe, out, data, engine, ranks
        self._states = out / "training" / "state"
        self._counters, self._progress = Counters(), progress
        self._recent: list[float] = []  # losses
        self._log: _Log | None = None  # of the first process

    def steps(self) -> float:
        """Take all that are left; the seconds of all."""
        r = self.recipe
        self._counters = load_state(self._states, self.engine)
        if self._counters.step == 0:
            save_state(self._states, self._counters, self.engine, self.ranks)  # to go back to
        self._open_log()
        with _sigterm() as told:
            while self._counters.step < r.steps:
                began = time.perf_counter()
                step = self._counters.step
                loss = self._step(step)
                if loss is None:
                    continue
                spent = self._counters.seconds + time.perf_counter() - began
                self._counters = dataclasses.replace(self._counters, step=step + 1, seconds=spent)
                figures = {
                    "loss": loss,
                    "learning_rate": learning_rate(r, step),
                    "tokens": (step + 1) * r.batch_size * r.sequence_length,
                    "seconds": spent,
                }
                if self._log is not None:
                    self._log.add(step + 1, figures)
                    self._progress("training", step + 1, r.steps, figures)
                stop = any_of(told(), self.ranks.device)
                if stop or (step + 1) % r.save_every == 0 or step + 1 == r.steps:
                    save_state(self._states, self._counters, self.engine, self.ranks)
                if stop:
                    raise Stopped(128 + signal.SIGTERM)
        return self._counters.seconds

    def evaluate(self, rows: Tensor) -> float:
        """Mean next-token loss, nats, over windows [n, T] of tokens; every process computes all of it."""
        micro, _ = share(self.recipe, self.ranks)
        self.engine.eval()
        with torch.no_grad():
            parts = torch.split(rows, micro)
            losses = [float(self._loss(part)) for part in parts]
        self.engine.train()
        return float(np.average(losses, weights=[len(part) for part in parts]))

    def _step(self, step: int) -> float | None:
        """One step of the optimizer; its loss, None where its batch was left out."""
        r, engine, ranks = self.recipe, self.engine, self.ranks
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(r, step)
        rows = self.data.batch(_number(step, self._counters.skipped), r.batch_size, r.sequence_length, r.seed)
        micro, _ = share(r, ranks)
        own = torch.from_numpy(rows[ranks.rank :: ranks.world])
        losses: list[float] = []
        for part in torch.split(own, micro):
            loss = self._loss(part)
            found = mean(loss)
            if not self._good(found):
                self._leave_out(step, found)
                if not losses:  # nothing of this batch is in the engine yet
                    return None
                loss, found = 0 * self._loss(own[:micro]), losses[-1]
            losses.append(found)
            engine.backward(loss)
            engine.step()
        self._recent = [*self._recent[-_RECENT + 1 :], float(np.mean(losses))]
        return self._recent[-1]

    def _good(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return False
        return len(self._recent) < _RECENT or loss < float(np.mean(self._recent)) + self.recipe.spike

    def _leave_out(self, step: int, loss: float) -> None:
        """Remember the batch as one that is left out; where the weights are spoilt too, go back to the last state."""
        numbers = {_number(step, self._counters.skipped)}
        finite = all(bool(p.isfinite().all()) for p in self.engine.module.parameters())
        self._say(f"the loss was {loss:.4g}: batch {min(numbers)} is left out", step)
        if any_of(not finite, self.ranks.device):
            numbers.add(_number(max(0, step - 1), self._counters.skipped))  # what spoilt them
            back = load_state(self._states, self.engine)
            self._say(f"the weights are spoilt: back to step {back.step}", step)
            self._counters = dataclasses.replace(back, skipped=self._counters.skipped)
            self._recent = []
            self._open_log()
        skipped = tuple(sorted({*self._counters.skipped, *numbers}))
        self._counters = dataclasses.replace(self._counters, skipped=skipped)
        if len(skipped) > _MOST_SKIPPED:
            raise UsageError(
                f"{self.out}: {len(skipped)} batches went wrong, the last one at step {step} with a loss of {loss}; "
                "lower learning_rate, or look at the data"
            )

    def _open_log(self) -> None:
        """Without the steps that are taken anew."""
        if self.ranks.first:
            self._log = _Log(self.out / "training" / "log.jsonl", self._counters.step)

    def _say(self, what: str, step: int) -> None:
        if self.ranks.first:
            self._progress(what, step, self.recipe.steps, {})

    def _loss(self, rows_BT: Tensor) -> Tensor:
        rows_BT = rows_BT.to(self.ranks.device)
        read_BT = rows_BT[:, :-1]
        documents_BT = None
        if self.recipe.documents_apart:  # the token that ends a document belongs to it
            ends = read_BT == self.engine.module.config.eos_token_id
            documents_BT = ends.cumsum(1) - ends.long()
        with torch.autocast(self.ranks.device.type, torch.bfloat16, enabled=self.recipe.precision == "bf16"):
            logits_BTV = self.engine(read_BT, documents_BT)
        return functional.cross_entropy(logits_BTV.flatten(0, 1).float(), rows_BT[:, 1:].flatten())


_RECENT = 20  # steps that a loss is compared with
_MOST_SKIPPED = 10


def _number(step: int, skipped: tuple[int, ...]) -> int:
    """Which batch a step takes: the step-th of those that were not left out."""
    number = step
    for left_out in sorted(skipped):
        if left_out <= number:
            number += 1
    return number


@contextmanager
def _sigterm() -> Iterator[Callable[[], bool]]:
    """Says whether SIGTERM came; it does nothing else meanwhile."""
    came = False

    def remember(number: int, frame: object) -> None:
        nonlocal came
        came = True

    before = signal.signal(signal.SIGTERM, remember)
    try:
        yield lambda: came
    finally:
        signal.signal(signal.SIGTERM, before)


def learning_rate(r: Recipe, step: int) -> float:
    """Linear warm-up, then down to `final_learning_rate` by the recipe's schedule."""
    if step < r.warmup_steps:
        return r.learning_rate * (step + 1) / r.warmup_steps
    if r.schedule == "constant":
        return r.learning_rate
    done = (step - r.warmup_steps) / max(1, r.steps - r.warmup_steps)
    left = 1 - done if r.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return r.final_learning_rate + (r.learning_rate - r.final_learning_rate) * left


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


def _load_weights(model: CausalLM, config: AnyConfig, folder: Path) -> None:
    """Begin with another checkpoint's weights. Raises UsageError for one of another architecture."""
    checkpoint = open_checkpoint(folder)
    shapes = {name: tensor.shape for name, tensor in checkpoint.tensors.items()}
    for name, shape in config.tensor_shapes().items():
        if shapes.get(name) != shape:
            raise UsageError(
                f"{folder}: {name} is {shapes.get(name)}, the recipe's model has {shape}; "
                "set model.… to its configuration"
            )
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(np.array(checkpoint.read(name))).view(p.shape))


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
