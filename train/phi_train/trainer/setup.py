"""Set up a run: its folder, its model, and the teacher or reference model."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from phi_runtime.architecture.checkpoint import open_checkpoint
from phi_runtime.architecture.config import AnyConfig, read_json
from phi_runtime.errors import OutputExistsError, PhiError, UsageError
from phi_runtime.files import locked, sha256, write_file
from phi_runtime.package.hub import local_checkpoint
from phi_runtime.text.tokenizer import FILE
from phi_runtime.version import __version__
from phi_train.data.batch import BatchStream
from phi_train.models import CausalLM, build, load_weights
from phi_train.models.initializer import init_weights
from phi_train.models.precision import DTYPES, chosen
from phi_train.models.recompute import DecoderLayer, recompute
from phi_train.recipes.config import Recipe, from_dict, to_dict, vary
from phi_train.recipes.estimate import flops_per_token
from phi_train.trainer.engine import Ranks, first_alone, gather
from phi_train.trainer.lora import enable_lora
from phi_train.trainer.qat import enable_qat
from phi_train.trainer.state import KEEP

# Settings that name a folder.
_PLACES = {"": ("init_from",), "data": ("corpus", "tokenizer", "shards", "phase2_shards"), "objective": ("teacher",)}


def check_same(ranks: Ranks, recipe: Recipe, stream: BatchStream) -> None:
    """Raise UsageError where processes, on other hosts say, have another version, recipe or data than the first.

    Folders may have other names there. The first process says why, the others leave.
    """
    if ranks.world == 1:
        return
    values = to_dict(recipe)
    for room, places in _PLACES.items():
        for name in places:
            (values[room] if room else values).pop(name)
    batches = (stream.batch(0), stream.heldout())
    has = {
        f"version (phi-edge {__version__}, torch {torch.__version__})": f"{__version__} {torch.__version__}".encode(),
        "recipe": json.dumps(values, sort_keys=True).encode(),
        "data": b"".join(batch.tokens.numpy().tobytes() for batch in batches),
    }
    digests = [int.from_bytes(hashlib.sha256(said).digest()[:7]) for said in has.values()]
    everyones = gather(digests, ranks.device)

    def compare() -> None:
        for rank, theirs in enumerate(everyones):
            for name, a, b in zip(has, everyones[0], theirs, strict=True):
                if a != b:
                    raise UsageError(f"process {rank} has another {name} than process 0; make its host the same")

    first_alone(ranks, compare)


def check_disk(recipe: Recipe, learnt: int, parameters: int, out: Path) -> None:
    """Raise UsageError where the states and the checkpoint of a run will not fit beside each other."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.is_dir())
    needed, free = 12 * learnt * (KEEP + 1) + 2 * parameters, shutil.disk_usage(there).free
    if needed > free:
        raise UsageError(
            f"{out}: {recipe.name} needs {needed / 1e9:.1f} GB on disk ({KEEP + 1} states of {12 * learnt / 1e9:.1f} "
            f"and the checkpoint), {free / 1e9:.1f} GB are free; choose another --out"
        )


def claim(recipe: Recipe, out: Path) -> bool:
    """Make the folder this recipe's own, or see that it already is; whether it is new.

    Raises UsageError for another recipe's folder, OutputExistsError for one that holds no run.
    """
    record = out / "training" / "recipe.json"
    wanted = _as_read(recipe)
    if record.is_file():
        there = read_json(record)
        with suppress(PhiError):  # what is no recipe of ours differs anyway
            there = _as_read(from_dict(there))  # settings that came later have their defaults
        _check_same(there, wanted, out)
        return False
    if out.exists() and not (out.is_dir() and not any(out.iterdir())):
        raise OutputExistsError(f"{out}: is there already and holds no run of ours; choose another --out")
    write_file(record, json.dumps(wanted, indent=1) + "\n")
    return True


def _as_read(recipe: Recipe) -> dict[str, Any]:
    """A recipe as its record reads again: lists for tuples."""
    values: dict[str, Any] = json.loads(json.dumps(to_dict(recipe)))
    return values


_PATIENCE = 30.0  # seconds: processes whose launcher was killed take their last step and save


@contextmanager
def hold(out: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keep a claimed folder from other runs. Raises UsageError where another run keeps it from us."""

    def held() -> None:
        raise UsageError(f"{out}: another run is writing it; wait for its end, or choose another --out")

    last = time.monotonic() + _PATIENCE
    with ExitStack() as kept:
        while True:
            try:
                kept.enter_context(locked(out / "training", held))
                break
            except UsageError:
                if time.monotonic() > last:
                    raise
            say(f"{out}: another run is writing it, waiting {_PATIENCE:.0f} s for its end")
            time.sleep(1)
        yield


# How a step is computed may change in the middle of a run.
_FREE = {"parallelism.": {"zero_stage", "micro_batch_size", "gradient_checkpointing", "offload_optimizer", "compile"}}


def _check_same(there: dict[str, Any], wanted: dict[str, Any], out: Path, room: str = "") -> None:
    """Raise UsageError for the first setting that a run has otherwise than wanted."""
    if not room and "optimizer" not in there:
        raise UsageError(f"{out}: holds a run of phi-edge 0.1; choose another --out, or continue it with that version")
    for name in sorted(set(wanted) - _FREE.get(room, set())):
        a, b = there.get(name), wanted[name]
        if isinstance(a, dict) and isinstance(b, dict):
            _check_same(a, b, out, f"{room}{name}.")
        elif a != b:
            raise UsageError(
                f"{out}: holds a run with {room}{name}={a}, not {b}; give that again, or choose another --out"
            )


def fetch_named(recipe: Recipe, note: Callable[[str], None]) -> Recipe:
    """The recipe with folders for the published models that it names. Raises the errors of `local_checkpoint`."""

    def folder(name: str | None) -> str | None:
        return None if name is None else str(local_checkpoint(name, note))

    return vary(
        recipe,
        init_from=folder(recipe.init_from),
        objective={"teacher": folder(recipe.objective.teacher)},
        data={"tokenizer": folder(recipe.data.tokenizer)},
    )


def unclaim(out: Path) -> None:
    """Leave nothing of a run that cannot begin, so that its command may be mended and given again."""
    shutil.rmtree(out / "training", ignore_errors=True)
    if out.is_dir() and not any(out.iterdir()):
        out.rmdir()


def make_model(r: Recipe, config: AnyConfig, tokenizer: Path, ranks: Ranks) -> CausalLM:
    """The recipe's model, with the weights that it begins with."""
    torch.manual_seed(r.seed)
    model = build(config)
    if r.init_from is None:
        init_weights(model, r.seed, r.initializer)
    else:
        _same_tokenizer(Path(r.init_from), tokenizer)
        load_weights(model, open_checkpoint(Path(r.init_from)))
    model.dropout = r.objective.dropout
    recompute(model, r.parallelism.gradient_checkpointing)
    if r.objective.qat is not None:
        enable_qat(model, r.objective.qat)
    if r.objective.lora_rank:
        enable_lora(model, r.objective.lora_rank, r.objective.lora_alpha, r.seed, r.objective.lora_base)
    _compute_in(precision(r, ranks.device), model, ranks.device)
    if compiled(r, ranks.device):
        for part in model.modules():
            if isinstance(part, DecoderLayer):
                part.compile()
    return model.to(ranks.device)


_WORTH = 2e14  # operations of a run: some minutes. Compiling takes half a minute, steps a third less


def compiled(r: Recipe, device: torch.device) -> bool:
    """Whether layers are compiled. "auto": on processors, for long runs of plain weights, where a compiler is."""
    if r.parallelism.compile != "auto":
        return r.parallelism.compile
    plain = r.objective.qat is None and not r.objective.lora_rank
    long = flops_per_token(r) * r.tokens > _WORTH
    return device.type == "cpu" and plain and long and shutil.which(os.environ.get("CXX", "g++")) is not None


def precision(r: Recipe, device: torch.device) -> str:
    """What a recipe's products are computed in on a device."""
    return "bf16" if r.parallelism.weights == "bf16" else chosen(r.parallelism.precision, device)


def make_teacher(r: Recipe, config: AnyConfig, tokenizer: Path, ranks: Ranks) -> CausalLM | None:
    """The frozen model whose opinion counts: a teacher, or what DPO begins with.

    Raises UsageError where it does not fit the recipe.
    """
    if r.frozen is None:
        return None
    folder = Path(r.frozen)
    checkpoint = open_checkpoint(folder)
    its = config if r.objective.type == "dpo" else checkpoint.config
    if its.vocab_size != config.vocab_size:
        raise UsageError(f"{folder}: has {its.vocab_size} token ids, its pupil {config.vocab_size}; choose another")
    if its.max_position_embeddings < r.data.sequence_length:
        raise UsageError(
            f"{folder}: has {its.max_position_embeddings} positions, fewer than data.sequence_length "
            f"{r.data.sequence_length}; choose another teacher or a shorter data.sequence_length"
        )
    _same_tokenizer(folder, tokenizer)
    model = build(its)
    load_weights(model, checkpoint)
    if r.objective.type == "dpo" and r.objective.qat is not None:
        enable_qat(model, r.objective.qat)
    _compute_in(precision(r, ranks.device), model, ranks.device)
    return model.to(ranks.device).eval().requires_grad_(False)


def _same_tokenizer(folder: Path, tokenizer: Path) -> None:
    its = folder / FILE
    if its.is_file() and sha256(its) != sha256(tokenizer / FILE):
        raise UsageError(
            f"{folder}: has another tokenizer than {tokenizer}; "
            f"set data.tokenizer={folder}, and data.shards made with it"
        )


def _compute_in(kind: str, model: CausalLM, device: torch.device) -> None:
    """Let a model's products be of 16 bits. Within its forward: DeepSpeed turns off an autocast that is around it."""
    if kind != "fp32":
        model.forward = torch.autocast(device.type, DTYPES[kind])(model.forward)  # type: ignore[method-assign]
