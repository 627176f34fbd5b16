"""The training loop around DeepSpeed.

A run's folder is the Hugging Face checkpoint it will become; what training itself needs lies in
`training/` inside it: recipe.json, state/, log.jsonl, summary.json, and the tokenizer and shards
where the recipe makes its own.
"""

import dataclasses
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from phi_runtime.architecture.config import AnyConfig
from phi_runtime.contract import encode, read_record
from phi_runtime.errors import CheckpointError, PhiError, UsageError
from phi_runtime.files import write_file
from phi_runtime.planning.available import available
from phi_runtime.text.tokenizer import Tokenizer
from phi_train.checkpoints.write import write_checkpoint
from phi_train.data.batch import Batch, BatchStream
from phi_train.data.streams import make_data, open_stream
from phi_train.data.tokenizer import END_OF_TEXT
from phi_train.models import CausalLM
from phi_train.models.greedy import continuations
from phi_train.recipes.config import Recipe
from phi_train.recipes.estimate import check_memory, flops_per_token
from phi_train.trainer.engine import Ranks, any_of, barrier, first_alone, join, make_engine, share, total
from phi_train.trainer.fragments import full_weights
from phi_train.trainer.logging import Log, plot_losses, write_samples
from phi_train.trainer.lora import ADAPTER, merge, write_adapter
from phi_train.trainer.loss_scale import LossScale, nothing_learnt
from phi_train.trainer.objectives import next_token, preference
from phi_train.trainer.packed import unpacked_weights
from phi_train.trainer.rate import peak
from phi_train.trainer.setup import (
    check_disk,
    check_same,
    claim,
    hold,
    make_model,
    make_teacher,
    precision,
    unclaim,
)
from phi_train.trainer.state import Counters, load_state, save_state
from phi_train.trainer.summary import Summary

# Told what happens: (what, steps done, steps in all, figures).
Progress = Callable[[str, int, int, dict[str, float]], None]


def train(recipe: Recipe, out: Path, progress: Progress = lambda *_: None) -> Summary:
    """Run a recipe into `out`, or continue the run that is there; the checkpoint appears at the end.

    Under torchrun or the deepspeed launcher every process calls it. A batch whose loss is no number, or far above the
    last ones', is left out, after going back to the last state where the weights are spoilt too.
    Raises UsageError for a recipe or data that do not fit, and for a run that goes wrong again and again;
    OutputExistsError for a foreign folder; Stopped after SIGTERM, the state saved.
    """
    if recipe.objective.type == "dpo" and recipe.init_from is None:
        raise UsageError(f"{recipe.name} compares with the model it begins with: give init_from")
    if recipe.objective.lora_rank and recipe.init_from is None:
        raise UsageError(f"{recipe.name} learns a difference from a checkpoint: give init_from")

    def say(what: str) -> None:
        progress(what, 0, recipe.schedule.steps, {})

    ranks = join(say)
    micro, _ = share(recipe, ranks)
    free = torch.cuda.mem_get_info(ranks.device)[0] if ranks.device.type == "cuda" else available()
    check_memory(recipe, micro, ranks.world, ranks.local_world if ranks.device.type == "cpu" else 1, free)
    with ExitStack() as kept:
        new = False

        def begin() -> None:
            nonlocal new
            new = claim(recipe, out)
            kept.enter_context(hold(out, say))

        first_alone(ranks, begin)
        return _train(recipe, out, new, ranks, progress, say)


def _train(
    recipe: Recipe, out: Path, new: bool, ranks: Ranks, progress: Progress, say: Callable[[str], None]
) -> Summary:
    """In a folder that is ours alone."""
    training = out / "training"
    if (training / "summary.json").is_file() and (out / "config.json").is_file():
        say(f"{out}: is complete already, nothing was trained")
        return read_record(training / "summary.json", Summary, CheckpointError, "train into another --out")
    try:
        first_alone(ranks, lambda: make_data(recipe, training, say))
        folder, stream = open_stream(recipe, training, say if ranks.first else lambda what: None)
        tokenizer = Tokenizer(folder)
        config = _with_tokens(recipe.model, tokenizer)
        check_same(ranks, recipe, stream)
        model = make_model(recipe, config, folder, ranks)
        if not (training / "state").exists():
            whole, learnt = (sum(p.numel() for p in model.parameters() if p.requires_grad or a) for a in (True, False))
            first_alone(ranks, lambda: check_disk(recipe, learnt, whole, out))
        teacher = make_teacher(recipe, config, folder, ranks)
    except PhiError:
        if new:
            unclaim(out)
        raise
    heldout = stream.heldout()
    engine = make_engine(model, recipe, ranks)
    run = _Run(recipe, out, stream, engine, teacher, ranks, progress)
    initial = run.evaluate(heldout)
    seconds = run.steps(tokenizer, heldout)
    summary = Summary(
        parameters=sum(math.prod(shape) for shape in config.tensor_shapes().values()),
        steps=recipe.schedule.steps,
        tokens=recipe.tokens,
        seconds=seconds,
        tokens_per_second=recipe.tokens / seconds,
        initial_loss=initial,
        final_loss=run.evaluate(heldout),
        unigram_loss=stream.unigram_loss(),
        heldout_tokens=heldout.count,
    )
    weights = full_weights(engine, ranks)
    if ranks.first:
        write_file(training / "summary.json", encode(summary))
        plot_losses(training, (summary.initial_loss, summary.final_loss))
        if recipe.objective.lora_rank:
            write_adapter(out / ADAPTER, weights, recipe)
            scale = recipe.objective.lora_alpha / recipe.objective.lora_rank
            weights = merge(weights | unpacked_weights(engine.module), scale)
        write_checkpoint(out, config, weights, folder)
        shutil.rmtree(training / "state")  # the run is over: nothing will be continued
    barrier()
    return summary


class Stopped(SystemExit):
    """SIGTERM came: the state was saved, and the same command goes on from there."""


class _Run:
    """The steps of a run on this process."""

    def __init__(
        self,
        recipe: Recipe,
        out: Path,
        stream: BatchStream,
        engine: Any,
        teacher: CausalLM | None,
        ranks: Ranks,
        progress: Progress,
    ) -> None:
        self.recipe, self.out, self.stream, self.engine, self.ranks = recipe, out, stream, engine, ranks
        self._teacher = teacher
        self._states = out / "training" / "state"
        self._counters, self._progress = Counters(), progress
        self._cut = 0  # parts of batches left out in this process's time
        kind = precision(recipe, ranks.device)
        self._scale = LossScale(engine.module, ranks.device) if kind == "fp16" else None
        self._log: Log | None = None  # of the first process
        # Utilisation is that share of all processes' peak which one token a second takes.
        self._share = flops_per_token(recipe) / (peak(ranks.device, kind) * ranks.world)

    def steps(self, tokenizer: Tokenizer, heldout: Batch) -> float:
        """Take all that are left; the seconds of all."""
        r = self.recipe
        self._go_on_from(load_state(self._states, self.engine, self.ranks))
        if self._counters.step == 0:
            save_state(self._states, self._counters, self.engine, self.ranks)  # to go back to
        self._open_log()
        with _sigterm() as told:
            while self._counters.step < r.schedule.steps:
                began = time.perf_counter()
                step = self._counters.step
                loss = self._step(step)
                if loss is None:
                    continue
                took = time.perf_counter() - began
                spent = self._counters.seconds + took
                self._counters = dataclasses.replace(self._counters, step=step + 1, seconds=spent)
                each = r.tokens // r.schedule.steps
                figures = {
                    "loss": loss,
                    "learning_rate": learning_rate(r, step),
                    "tokens": (step + 1) * each,
                    "tokens_per_second": each / took,
                    "utilisation": each / took * self._share,
                    "seconds": spent,
                }
                if self._log is not None:
                    self._log.add(step + 1, figures)
                    self._progress("training", step + 1, r.schedule.steps, figures)
                stop = any_of(told(), self.ranks.device)
                if stop or (step + 1) % r.save_every == 0 or step + 1 == r.schedule.steps:
                    save_state(self._states, self._counters, self.engine, self.ranks)
                    self._sample(step + 1, tokenizer, heldout)
                if stop:
                    self._say(
                        f"stopped by SIGTERM; the state is saved, the same command goes on from step {step + 1}", step
                    )
                    raise Stopped(128 + signal.SIGTERM)
        if self._log is not None:
            self._log.close()
        return self._counters.seconds

    def _sample(self, step: int, tokenizer: Tokenizer, heldout: Batch) -> None:
        """Let the model go on with the beginnings of held-out texts."""
        r = self.recipe
        if not r.samples:
            return
        prompts = heldout.tokens[: r.samples, 0, : min(_PROMPT, r.data.sequence_length // 2)].tolist()
        self.engine.eval()
        said = continuations(self.engine, prompts, _NEW, r.model.max_position_embeddings, device=self.ranks.device)
        self.engine.train()
        if self._log is not None:
            pairs = zip(prompts, said, strict=True)
            write_samples(self.out / "training" / "samples.jsonl", self._log, step, tokenizer, pairs)

    def evaluate(self, heldout: Batch) -> float:
        """Mean loss, nats, over held-out tokens, or over pairs; every process computes all of it."""
        micro, _ = share(self.recipe, self.ranks)
        self.engine.eval()
        with torch.no_grad():
            losses = [float(self._loss(part, taught=False)) for part in heldout.split(micro)]
        self.engine.train()
        return sum(losses) / self._units(heldout)

    def _step(self, step: int) -> float | None:
        """One step of the optimizer; its loss, None where its batch was left out."""
        r, engine, ranks = self.recipe, self.engine, self.ranks
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(r, step)
        if step == r.data.phase2_step:  # other data has other losses: those before say nothing of its own
            self._counters = dataclasses.replace(self._counters, recent=())
        batch = self.stream.batch(_number(step, self._counters.skipped))
        micro, times = share(r, ranks)
        own = batch[ranks.rank :: ranks.world]
        # The engine takes the mean over processes and parts; what is wanted is that over all tokens of the batch.
        weight = ranks.world * times / self._units(batch)
        sums, counts = 0.0, 0.0
        for part in own.split(micro):
            loss = self._loss(part)
            said = torch.stack([loss.detach(), torch.tensor(float(self._units(part)), device=loss.device)])
            found, count = total(said)
            if not self._good(found / count):
                if not counts:  # nothing of this batch is in the engine yet
                    self._leave_out(step, found / count)
                    return None
                self._leave_out_part(step, found / count)
                loss, found, count = 0 * self._loss(own[:micro]), 0.0, 0.0
            sums, counts = sums + found, counts + count
            if self._scale is None:
                engine.backward(loss * weight)
                engine.step()
            else:
                engine.backward(loss * (weight * self._scale.scale))
                self._scaled_step(self._scale)
        recent = (*self._counters.recent[-_RECENT + 1 :], sums / counts)
        self._counters = dataclasses.replace(self._counters, recent=recent)
        return sums / counts

    def _scaled_step(self, scale: LossScale) -> None:
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()
            return
        overflow = any_of(scale.overflowed(), self.ranks.device)
        with nothing_learnt(self.engine.optimizer) if overflow else nullcontext():
            self.engine.step()
        scale.adapt(overflow)
        self._counters = dataclasses.replace(self._counters, scale=scale.scale, good=scale.good)

    def _go_on_from(self, counters: Counters) -> None:
        self._counters = counters
        if self._scale is not None and counters.step:
            self._scale.scale, self._scale.good = counters.scale, counters.good

    def _good(self, loss: float) -> bool:
        if not math.isfinite(loss):
            return False
        recent = self._counters.recent
        return len(recent) < _RECENT or loss < float(np.mean(recent)) + self.recipe.loss_spike_threshold

    def _leave_out(self, step: int, loss: float) -> None:
        """Remember the batch as one that is left out; where the weights are spoilt too, go back to the last state."""
        numbers = {_number(step, self._counters.skipped)}
        finite = all(bool(p.isfinite().all()) for p in self.engine.module.parameters())
        self._say(f"the loss was {loss:.4g}: batch {min(numbers)} is left out", step)
        if any_of(not finite, self.ranks.device):
            numbers.add(_number(max(0, step - 1), self._counters.skipped))  # what spoilt them
            back = load_state(self._states, self.engine, self.ranks)
            self._say(f"the weights are spoilt: back to step {back.step}", step)
            self._go_on_from(dataclasses.replace(back, skipped=self._counters.skipped))
            self._open_log()
        skipped = tuple(sorted({*self._counters.skipped, *numbers}))
        self._counters = dataclasses.replace(self._counters, skipped=skipped)
        self._check_patience(step, loss)

    def _leave_out_part(self, step: int, loss: float) -> None:
        """The other parts of the batch are learnt from all the same."""
        self._say(f"the loss was {loss:.4g}: a part of the batch of step {step + 1} is left out", step)
        self._cut += 1
        self._check_patience(step, loss)

    def _check_patience(self, step: int, loss: float) -> None:
        wrong = len(self._counters.skipped) + self._cut
        if wrong > _MOST_SKIPPED:
            raise UsageError(
                f"{self.out}: {wrong} batches went wrong, the last one at step {step} with a loss of {loss}; "
                "lower optimizer.lr, or look at the data"
            )

    def _open_log(self) -> None:
        """Without the steps that are taken anew."""
        if self.ranks.first:
            self._log = Log(self.out / "training", self._counters.step)

    def _say(self, what: str, step: int) -> None:
        if self.ranks.first:
            self._progress(what, step, self.recipe.schedule.steps, {})

    def _units(self, batch: Batch) -> int:
        """What a loss is the mean over: tokens, or pairs."""
        return len(batch) if self.recipe.objective.type == "dpo" else max(1, batch.count)

    def _loss(self, part: Batch, taught: bool = True) -> Tensor:
        """The objective's sum over a part of a batch; `taught`: the teacher has its say."""
        r, part = self.recipe, part.to(self.ranks.device)
        if r.objective.type == "dpo":
            assert self._teacher is not None
            return preference(
                self.engine, part, self._teacher, r.objective.dpo_beta, r.objective.nll_weight if taught else 0.0
            )
        return next_token(self.engine, part, self._teacher if taught else None, r.objective.distillation)


_RECENT = 20  # steps that a loss is compared with
_MOST_SKIPPED = 10
_PROMPT, _NEW = 32, 32  # tokens of a sample


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
    if step < r.schedule.warmup_steps:
        return r.optimizer.lr * (step + 1) / r.schedule.warmup_steps
    if r.schedule.type == "constant":
        return r.optimizer.lr
    done = (step - r.schedule.warmup_steps) / max(1, r.schedule.steps - r.schedule.warmup_steps)
    left = 1 - done if r.schedule.type == "linear" else (1 + math.cos(math.pi * done)) / 2
    return r.schedule.final_lr + (r.optimizer.lr - r.schedule.final_lr) * left


def _with_tokens(config: AnyConfig, tokenizer: Tokenizer) -> AnyConfig:
    """The architecture with the tokenizer's own special tokens."""
    end = tokenizer.id(END_OF_TEXT)
    return dataclasses.replace(config, bos_token_id=tokenizer.id("<s>"), eos_token_id=end, pad_token_id=end)
