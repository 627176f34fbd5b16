"""DeepSpeed around a model, on one process or many: who we are among them, and the engine with its optimizer.

Weights and optimizer are float32 and bf16 is autocast's, or the weights are bf16 beside a float32 copy of ZeRO's. Its
stages 1 to 3 divide the optimizer's state, gradients and weights among the processes (arXiv:1910.02054).
"""

import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch

os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")

import deepspeed
from torch import Tensor, distributed, nn
from torch.distributed.rendezvous import rendezvous

from phi_runtime.backends import cores
from phi_runtime.errors import PhiError, UsageError
from phi_train.allocator import keep_freed_memory
from phi_train.orphan import when_orphaned
from phi_train.recipes.config import Recipe


@dataclass(frozen=True)
class Ranks:
    """This process among all. torchrun and the deepspeed launcher say it in the environment."""

    rank: int
    world: int
    local: int
    local_world: int

    @property
    def first(self) -> bool:
        """Whether this is the one that writes."""
        return self.rank == 0

    @property
    def device(self) -> torch.device:
        """Where this process computes."""
        return torch.device("cuda", self.local) if torch.cuda.is_available() else torch.device("cpu")


def join(say: Callable[[str], None] = lambda what: None) -> Ranks:
    """Meet the other processes. say: told where, before. Raises UsageError where some do not come."""
    told = {name: int(os.environ.get(name, default)) for name, default in _ENVIRONMENT.items()}
    if "LOCAL_WORLD_SIZE" not in os.environ:  # DeepSpeed's launcher has another name for it
        told["LOCAL_WORLD_SIZE"] = int(os.environ.get("LOCAL_SIZE", 1))
    ranks = Ranks(told["RANK"], told["WORLD_SIZE"], told["LOCAL_RANK"], told["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available():
        torch.cuda.set_device(ranks.local)
    # torchrun sets one thread where nothing is said, so among many processes the variable says nothing.
    said = os.environ.get("OMP_NUM_THREADS", "") if ranks.local_world == 1 else ""
    torch.set_num_threads(int(said) if said.isdigit() and int(said) else max(1, cores() // ranks.local_world))
    if not torch.cuda.is_available():
        _tune_processor()
    # Processes on processors have gloo; DeepSpeed need not compile its op for shared memory.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    os.environ.setdefault("LOCAL_RANK", "0")
    if not distributed.is_initialized():
        if _LAUNCHED & set(os.environ):
            # A launcher that is killed, for want of memory say, ends none of its processes: they save, and leave.
            when_orphaned(os.getppid(), lambda: os.kill(os.getpid(), signal.SIGTERM))
        backend = "nccl" if torch.cuda.is_available() else "gloo"
        if ranks.world == 1:
            # One process meets nobody: no port to be taken, no file to be left.
            store = distributed.HashStore()  # type: ignore[attr-defined]  # its stub is missing
            distributed.init_process_group(backend, store=store, rank=0, world_size=1)
        else:
            say(f"process {ranks.rank} of {ranks.world} meets the others at {_place()}")
            with _ended_at_once():
                distributed.init_process_group(backend, store=_meet(ranks), rank=ranks.rank, world_size=ranks.world)
    return ranks


def _place() -> str:
    return f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"


@contextmanager
def _ended_at_once() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process while it waits in a call that no handler of Python's interrupts."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


_PATIENCE = timedelta(minutes=10)  # for hosts that start later; torchrun's own too


def _meet(ranks: Ranks) -> Any:
    try:
        store, *_ = next(rendezvous("env://", ranks.rank, ranks.world, timeout=_PATIENCE))
    except distributed.DistError:
        raise UsageError(
            f"process {ranks.rank} waited {_PATIENCE.total_seconds():.0f} s for all {ranks.world} to meet at "
            f"{_place()}; see that each host runs the command and reaches that address"
        ) from None
    store.set_timeout(distributed.default_pg_timeout)
    return store


# DeepSpeed calls torch by names that torch has since renamed; nobody who trains can do anything about it.
warnings.filterwarnings("ignore", r"`torch\.distributed\..*` is deprecated", FutureWarning)
_LAUNCHED = {"TORCHELASTIC_RUN_ID", "LOCAL_SIZE"}  # what torchrun and the deepspeed launcher alone say
_ENVIRONMENT = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}


def _tune_processor() -> None:
    """Freed memory is kept for the next step. Numbers too small for float32's exponent are zero: gradients are full of
    them, and they take a processor a hundred times as long.
    """
    torch.set_flush_denormal(True)
    keep_freed_memory()


@contextmanager
def parting() -> Iterator[None]:
    """Part from the other processes when the block ends, so that none finds a connection broken.

    After an error too, without waiting for anyone: gloo's threads would end the interpreter by SIGABRT.
    """
    try:
        yield
    except BaseException:
        if distributed.is_initialized() and distributed.get_backend() == "gloo":
            distributed.destroy_process_group()
        raise
    if distributed.is_initialized():
        barrier()
        distributed.destroy_process_group()


def share(recipe: Recipe, ranks: Ranks) -> tuple[int, int]:
    """Sequences that a process takes at a time, and how many times a step. Raises UsageError."""
    if recipe.data.batch_size % ranks.world:
        raise UsageError(
            f"data.batch_size {recipe.data.batch_size} does not divide among {ranks.world} processes; "
            "change one of them"
        )
    each = recipe.data.batch_size // ranks.world
    micro = recipe.parallelism.micro_batch_size or each
    if each % micro:
        raise UsageError(f"micro_batch_size {micro} does not divide the {each} sequences of a process; change it")
    return micro, each // micro


def make_engine(model: nn.Module, r: Recipe, ranks: Ranks) -> Any:
    """The engine; its optimizer is `engine.optimizer`."""
    # Decay pulls matrices towards zero, norms it would pull off their scale.
    learnt = [p for p in model.parameters() if p.requires_grad]
    matrices, vectors = ([p for p in learnt if (p.ndim == 2) == flat] for flat in (True, False))
    groups = [{"params": matrices, "weight_decay": r.optimizer.weight_decay}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(
        groups, lr=r.optimizer.lr, betas=(r.optimizer.beta1, r.optimizer.beta2), eps=r.optimizer.eps, fused=True
    )
    micro, times = share(r, ranks)
    config: dict[str, Any] = {
        "train_batch_size": r.data.batch_size,
        "train_micro_batch_size_per_gpu": micro,
        "gradient_accumulation_steps": times,
        "gradient_clipping": r.optimizer.max_grad_norm,
        "zero_optimization": {"stage": r.parallelism.zero_stage},
        "zero_allow_untested_optimizer": True,
        "steps_per_print": 10**9,
    }
    if r.parallelism.weights == "bf16":
        config["bf16"] = {"enabled": True}
    if r.parallelism.offload_optimizer:
        config["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
        config["zero_force_ds_cpu_optimizer"] = False  # DeepSpeed's own wants a compiler; torch's is fused too
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    if ranks.world == 1 and r.parallelism.zero_stage == 0:
        engine.enable_backward_allreduce = False  # gradients would be summed with nobody's, and copied twice for it
    return engine


def total(values: Tensor) -> list[float]:
    """The sums of some numbers over all processes."""
    values = values.detach().clone()
    if distributed.get_world_size() > 1:
        distributed.all_reduce(values)
    return [float(v) for v in values]


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether it is so for any process."""
    return total(torch.tensor([float(flag)], device=device))[0] > 0


def together(ranks: Ranks, work: Callable[[], None]) -> None:
    """Let every process do something; where one fails, the others leave too, and it alone says why."""
    error = None
    try:
        work()
    except PhiError as e:
        error = e
    if any_of(error is not None, ranks.device):
        raise error or SystemExit(2)


def first_alone(ranks: Ranks, work: Callable[[], None]) -> None:
    """Let the first process do something for all; see `together`."""
    together(ranks, work if ranks.first else lambda: None)


def gather(numbers: list[int], device: torch.device) -> list[list[int]]:
    """Some integers below 2^63 of each process, as many from each."""
    own = torch.tensor(numbers, dtype=torch.int64, device=device)
    found = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(found, own)
    return [part.tolist() for part in found]


def barrier() -> None:
    """Wait for all."""
    if distributed.get_world_size() > 1:
        distributed.barrier()
